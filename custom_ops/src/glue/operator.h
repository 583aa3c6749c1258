// An operator as data: what the callbacks of OrtCustomOp answer.
#pragma once

#include "glue/custom_op_struct.h"
#include "glue/node.h"

namespace osl::ort {

constexpr char kDomain[] = "onnxslim_llm.ops";
constexpr int32_t kDomainVersion = 1;

constexpr int32_t kSameAsOutput = -1;  // the element type that kernels differ in

struct Input {
    int32_t type;
    Characteristic characteristic;
};

struct Operator;

// Which element types an operator exists for. Those with several must have an input of that type: by it the runtime
// tells them apart.
enum ElementTypes { kFloatOnly, kAnyFloat };

// What all element types of an operator share.
struct Definition {
    const char* name;
    const Input* inputs;
    size_t input_count;
    ElementTypes element_types;
    OrtStatus* (*create)(const Operator&, const OrtApi*, const OrtKernelInfo*, void** kernel);
    OrtStatus* (*compute)(void* kernel, OrtKernelContext*);
    void (*destroy)(void* kernel);
    // Asked of one of the element types for all of them.
    OrtStatus* (*infer_shapes)(const OrtApi*, OrtShapeInferContext*);
};

// One operator for one element type in one runtime. The first member is what the runtime sees.
struct Operator {
    OrtCustomOp callbacks;
    const Definition* definition;
    const OrtApi* api;
    int32_t element_type;
    Runtime runtime;
};

Operator make_operator(const Definition& definition, const OrtApi* api, int32_t element_type, const Runtime& runtime);

extern const Definition kMatMulPacked;
extern const Definition kGatherPacked;
extern const Definition kEmptyNode;

}  // namespace osl::ort
