// The entries of ONNX Runtime's C interface that this library calls, declared here because no package ships the
// headers.
//
// OrtApi is a table of function pointers that only ever grows at its end, so an entry is a number: its place in the
// table, the same in every release since the one that brought it. `Entry` checks each number against the size that the
// table had before and after that release; tests/custom_ops/test_op_releases.py calls every entry in several releases.
#pragma once

#include <cstddef>
#include <cstdint>

extern "C" {
struct OrtApi;  // the table
struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtOpAttr;
struct OrtTypeInfo;
struct OrtTensorTypeAndShapeInfo;
struct OrtValue;
struct OrtAllocator;
struct OrtMemoryInfo;
struct OrtCustomOp;

// What RegisterCustomOps is given: the way to the table of a release, or null if the runtime is older.
struct OrtApiBase {
    const OrtApi* (*get_api)(uint32_t release);
    const char* (*get_version_string)();
};
}

namespace osl::ort {

// The oldest release that has everything this library cannot do without (ParallelFor, shape inference): 1.17.
constexpr uint32_t kOldestRelease = 17;

// Values of ONNXTensorElementDataType, the same as TensorProto.DataType for these.
enum ElementType : int32_t {
    kUndefined = 0,
    kFloat = 1,
    kUint8 = 2,
    kInt32 = 6,
    kInt64 = 7,
    kFloat16 = 10,
    kBfloat16 = 16
};
enum ErrorCode : int32_t { kFail = 1, kInvalidArgument = 2, kInvalidGraph = 10 };
enum OpAttributeType : int32_t { kAttributeInt = 1, kAttributeString = 5 };
enum MemoryType : int32_t { kDefaultMemory = 0 };

// Entries in the table of release 1.x, for the releases that brought an entry used here, and those before them.
constexpr size_t entries_of(uint32_t release) {
    switch (release) {
        case 0:
            return 0;
        case 13:
        case 14:
            return 239;
        case 15:
            return 255;
        case 16:
            return 266;
        case 17:
            return 276;
        case 18:
            return 280;
        case 23:
            return 390;
        case 24:
            return 415;
        default:
            return 0;
    }
}

// One entry: the release 1.x that brought it (14 stands for that one and all before), its place, and its signature.
template <uint32_t kRelease, size_t kPlace, typename Result, typename... Args>
struct Entry {
    static_assert(kPlace < entries_of(kRelease), "the table of that release has no such entry");
    static_assert(kRelease == 14 || kPlace >= entries_of(kRelease - 1), "an earlier release has this entry");

    static Result call(const OrtApi* api, Args... args) {
        using Function = Result (*)(Args...);
        return reinterpret_cast<const Function*>(api)[kPlace](args...);
    }
};

template <uint32_t kRelease, size_t kPlace, typename... Args>
using Fallible = Entry<kRelease, kPlace, OrtStatus*, Args...>;  // null is success; the caller releases a status

using CreateStatus = Fallible<14, 0, int32_t, const char*>;  // copies the message
using GetErrorMessage = Entry<14, 2, const char*, const OrtStatus*>;
using ReleaseStatus = Entry<14, 93, void, OrtStatus*>;

using CreateCustomOpDomain = Fallible<14, 26, const char*, OrtCustomOpDomain**>;
using CustomOpDomainAdd = Fallible<14, 27, OrtCustomOpDomain*, const OrtCustomOp*>;
using AddCustomOpDomain = Fallible<14, 28, OrtSessionOptions*, OrtCustomOpDomain*>;
using ReleaseCustomOpDomain = Entry<14, 101, void, OrtCustomOpDomain*>;

using GetTensorMutableData = Fallible<14, 51, OrtValue*, void**>;
using CastTypeInfoToTensorInfo = Fallible<14, 55, const OrtTypeInfo*, const OrtTensorTypeAndShapeInfo**>;
using CreateTensorTypeAndShapeInfo = Fallible<14, 57, OrtTensorTypeAndShapeInfo**>;
using SetTensorElementType = Fallible<14, 58, OrtTensorTypeAndShapeInfo*, int32_t>;
using SetDimensions = Fallible<14, 59, OrtTensorTypeAndShapeInfo*, const int64_t*, size_t>;
using GetTensorElementType = Fallible<14, 60, const OrtTensorTypeAndShapeInfo*, int32_t*>;
using GetDimensionsCount = Fallible<14, 61, const OrtTensorTypeAndShapeInfo*, size_t*>;
using GetDimensions = Fallible<14, 62, const OrtTensorTypeAndShapeInfo*, int64_t*, size_t>;
using GetSymbolicDimensions = Fallible<14, 63, const OrtTensorTypeAndShapeInfo*, const char**, size_t>;
using GetTensorTypeAndShape = Fallible<14, 65, const OrtValue*, OrtTensorTypeAndShapeInfo**>;
using ReleaseTypeInfo = Entry<14, 98, void, OrtTypeInfo*>;
using ReleaseTensorTypeAndShapeInfo = Entry<14, 99, void, OrtTensorTypeAndShapeInfo*>;
using ReleaseValue = Entry<14, 96, void, OrtValue*>;
// Without a copy of the shape; the pointer is the value's own.
using GetTensorElementTypeAndShapeData = Fallible<24, 414, const OrtValue*, int32_t*, const int64_t**, size_t*>;

using AllocatorAlloc = Fallible<14, 75, OrtAllocator*, size_t, void**>;
using AllocatorFree = Fallible<14, 76, OrtAllocator*, void*>;
using ReleaseAllocator = Entry<14, 132, void, OrtAllocator*>;
using CreateCpuMemoryInfo = Fallible<14, 69, int32_t, int32_t, OrtMemoryInfo**>;
using ReleaseMemoryInfo = Entry<14, 94, void, OrtMemoryInfo*>;
using KernelContextGetAllocator = Fallible<15, 253, const OrtKernelContext*, const OrtMemoryInfo*, OrtAllocator**>;
using KernelInfoGetAllocator = Fallible<18, 278, const OrtKernelInfo*, int32_t, OrtAllocator**>;

using KernelInfoGetAttributeInt = Fallible<14, 86, const OrtKernelInfo*, const char*, int64_t*>;
using KernelInfoGetAttributeString = Fallible<14, 87, const OrtKernelInfo*, const char*, char*, size_t*>;
using KernelInfoGetInputCount = Fallible<14, 230, const OrtKernelInfo*, size_t*>;
using KernelInfoGetInputTypeInfo = Fallible<14, 234, const OrtKernelInfo*, size_t, OrtTypeInfo**>;
using KernelInfoGetNodeName = Fallible<15, 244, const OrtKernelInfo*, char*, size_t*>;
using KernelInfoGetConstantInput = Fallible<15, 249, const OrtKernelInfo*, size_t, int32_t*, const OrtValue**>;

using KernelContextGetInputCount = Fallible<14, 88, const OrtKernelContext*, size_t*>;
using KernelContextGetInput = Fallible<14, 90, const OrtKernelContext*, size_t, const OrtValue**>;
using KernelContextGetOutput = Fallible<14, 91, OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**>;
// Runs body(data, 0 ... total - 1) on the session's own threads, the caller's among them; 0 batches: as it sees fit.
using ParallelFor =
    Fallible<17, 274, const OrtKernelContext*, void (*)(void*, size_t), size_t /*total*/, size_t /*batches*/, void*>;

using ShapeContextGetInputCount = Fallible<17, 267, const OrtShapeInferContext*, size_t*>;
// The info belongs to the context.
using ShapeContextGetInput = Fallible<17, 268, const OrtShapeInferContext*, size_t, OrtTensorTypeAndShapeInfo**>;
using ShapeContextGetAttribute = Fallible<17, 269, const OrtShapeInferContext*, const char*, const OrtOpAttr**>;
using ShapeContextSetOutput = Fallible<17, 270, const OrtShapeInferContext*, size_t, const OrtTensorTypeAndShapeInfo*>;
using SetSymbolicDimensions = Fallible<17, 271, OrtTensorTypeAndShapeInfo*, const char**, size_t>;
using ReadOpAttribute = Fallible<17, 272, const OrtOpAttr*, int32_t, void*, size_t, size_t*>;

}  // namespace osl::ort
