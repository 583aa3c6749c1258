// Packed weights and their products on many threads, for ThreadSanitizer: callers that share a weight, threads that
// share a product, threads that pack one weight together. Exits with 1 at the first difference from one thread.
//
//     thread_test [rounds = 20]
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "kernels/gather_packed.h"
#include "kernels/matmul.h"

namespace {

using namespace osl;

constexpr int kThreads = 4;
// One row works on the stack of a caller, the others share the work out; from 17 on with AMX.
constexpr int64_t kRows[] = {1, 5, 17, 70};

[[noreturn]] void fail(const char* what) {
    printf("FAILED: %s\n", what);
    exit(1);
}

// What a runtime's pool does: threads take units until none is left. Returns when all are done.
template <typename Body>
void parallel(int64_t units, const Body& body) {
    std::atomic<int64_t> next{0};
    const auto work = [&] {
        for (int64_t unit = next++; unit < units; unit = next++) body(unit);
    };
    std::vector<std::thread> threads;
    for (int i = 1; i < kThreads; i++) threads.emplace_back(work);
    work();
    for (auto& thread : threads) thread.join();
}

template <typename Body>
void all_at_once(const Body& body) {
    std::atomic<int> waiting{kThreads};
    std::vector<std::thread> threads;
    for (int i = 0; i < kThreads; i++)
        threads.emplace_back([&, i] {
            for (waiting--; waiting > 0;) std::this_thread::yield();
            body(i);
        });
    for (auto& thread : threads) thread.join();
}

struct Case {
    PackedScheme scheme = {4, 32, kScaleFloat16, true};
    ColumnOrder order = kPairedHalves;
    int64_t rows = 200, columns = 160;
    std::vector<uint8_t> codes, scales, zeros, packed;
    std::vector<float> a, bias, residual, u, v;

    explicit Case(unsigned seed) {
        std::mt19937 rng(seed);
        const auto bytes = [&rng](int64_t count) {
            std::vector<uint8_t> made((size_t)count);
            for (auto& byte : made) byte = (uint8_t)rng();
            return made;
        };
        const auto floats = [&rng](int64_t count) {
            std::normal_distribution<float> normal;
            std::vector<float> made((size_t)count);
            for (auto& value : made) value = normal(rng);
            return made;
        };
        const int64_t blocks = (rows + scheme.block - 1) / scheme.block;
        codes = bytes(columns * blocks * scheme.block * scheme.bits / 8);
        zeros = bytes(columns * ((blocks * scheme.bits + 7) / 8));
        scales.resize((size_t)(columns * blocks * 2));
        for (size_t i = 0; i < scales.size(); i += 2) scales[i] = (uint8_t)rng(), scales[i + 1] = 0x20;  // about 0.01
        packed.resize((size_t)packed_weight_bytes(scheme, rows, columns, order));
        a = floats(kRows[3] * rows);
        bias = floats(columns);
        residual = floats(kRows[3] * columns / 2);
        u = floats(rows * 3);
        v = floats(3 * columns);
    }

    NBitsArrays arrays() { return {codes.data(), scales.data(), zeros.data()}; }

    MatMulProblem problem(int64_t m, Accuracy accuracy, std::vector<float>* y) const {
        MatMulProblem p = {};
        if (parse_packed_weight(packed.data(), packed.size(), &p.b)) fail("the weight does not parse");
        y->assign((size_t)(m * columns / 2), -1.0f);
        p.a = a.data();
        p.y = y->data();
        p.m = m;
        p.a_stride = rows;
        p.y_stride = p.residual_stride = columns / 2;
        p.accuracy = accuracy;
        p.activation = kSiluGate;
        p.bias = bias.data();
        p.residual = residual.data();
        p.low_rank_u = u.data();
        p.low_rank_v = v.data();
        p.rank = 3;
        return p;
    }
};

void compute(const MatMulProblem& p, KernelIsa isa, bool shared) {
    MatMulPlan plan;
    if (const char* error = plan_matmul(p, kThreads, isa, &plan)) fail(error);
    const std::unique_ptr<uint8_t[]> scratch(new uint8_t[(size_t)plan.scratch_bytes]);
    const auto prepare = [&](int64_t unit) { prepare_matmul(p, plan, scratch.get(), unit, unit + 1); };
    const auto run = [&](int64_t unit) { run_matmul(p, plan, scratch.get(), unit, unit + 1); };
    if (shared) {
        parallel(plan.prepare_units, prepare);
        parallel(plan.run_units, run);
        return;
    }
    for (int64_t unit = 0; unit < plan.prepare_units; unit++) prepare(unit);
    for (int64_t unit = 0; unit < plan.run_units; unit++) run(unit);
}

void check_packing(Case& made) {
    const int64_t strips = strip_count(made.columns, made.order);
    std::vector<uint8_t> alone(made.packed.size());
    pack_weight(made.arrays(), made.scheme, made.rows, made.columns, made.order, 0, strips, alone.data());
    parallel(strips, [&](int64_t strip) {
        pack_weight(made.arrays(), made.scheme, made.rows, made.columns, made.order, strip, strip + 1,
                    made.packed.data());
    });
    if (alone != made.packed) fail("packed by several threads");
    PackedWeight w;
    if (parse_packed_weight(alone.data(), alone.size(), &w)) fail("the weight does not parse");
    Case back = made;
    parallel(strips, [&](int64_t strip) { unpack_weight(w, strip, strip + 1, back.arrays()); });
    if (back.scales != made.scales) fail("unpacked by several threads");
}

// The first product of a process chooses the instruction set: all threads may ask for it at once.
void check_callers(const Case& made, KernelIsa isa) {
    for (const Accuracy accuracy : {kExact, kInt8}) {
        std::vector<float> results[kThreads][4];
        all_at_once([&](int caller) {
            for (int i = 0; i < 4; i++)
                compute(made.problem(kRows[i], accuracy, &results[caller][i]), isa, false);
        });
        for (int caller = 1; caller < kThreads; caller++)
            for (int i = 0; i < 4; i++)
                if (results[caller][i] != results[0][i]) fail("callers at once");
    }
}

void check_shared_products(const Case& made, KernelIsa isa) {
    for (const Accuracy accuracy : {kExact, kBf16, kInt8}) {
        for (const int64_t m : kRows) {
            std::vector<float> alone, shared;
            compute(made.problem(m, accuracy, &alone), isa, false);
            compute(made.problem(m, accuracy, &shared), isa, true);
            if (alone != shared) fail("a product by several threads");
        }
    }
}

// Units of a sparse weight expand into scratch of their own.
void check_sparse_products(const Case& made, KernelIsa isa) {
    PackedWeight w;
    if (parse_packed_weight(made.packed.data(), made.packed.size(), &w)) fail("the weight does not parse");
    std::vector<uint8_t> bytes((size_t)sparse_weight_bytes(w));
    make_sparse(w, (int64_t)bytes.size(), bytes.data());
    SparseWeight sparse;
    if (parse_sparse_weight(bytes.data(), bytes.size(), &sparse)) fail("the sparse weight does not parse");
    for (const Accuracy accuracy : {kExact, kInt8}) {
        for (const int64_t m : kRows) {
            std::vector<float> dense, shared;
            compute(made.problem(m, accuracy, &dense), isa, false);
            MatMulProblem p = made.problem(m, accuracy, &shared);
            p.b = sparse.packed;
            p.sparse = &sparse;
            compute(p, isa, true);
            if (dense != shared) fail("a sparse product by several threads");
        }
    }
}

void check_look_ups(const Case& made) {
    PackedWeight w;
    if (parse_packed_weight(made.packed.data(), made.packed.size(), &w)) fail("the weight does not parse");
    std::vector<float> rows((size_t)(made.columns * made.rows)), alone = rows;
    parallel(made.columns, [&](int64_t n) { read_column(w, n, rows.data() + n * made.rows); });
    for (int64_t n = 0; n < made.columns; n++) read_column(w, n, alone.data() + n * made.rows);
    if (rows != alone) fail("look-ups by several threads");
}

}  // namespace

int main(int argc, char** argv) {
    const int rounds = argc > 1 ? atoi(argv[1]) : 20;
    for (int round = 0; round < rounds; round++) {
        Case made((unsigned)round);
        check_packing(made);
        check_callers(made, kAutoIsa);
        for (int32_t isa = kIsaScalar; isa < kKernelIsas; isa++)
            if (supports((KernelIsa)isa)) {
                check_shared_products(made, (KernelIsa)isa);
                check_sparse_products(made, (KernelIsa)isa);
            }
        made.order = kPlainColumns;  // what a table is
        check_packing(made);
        check_look_ups(made);
    }
    printf("%d rounds on %d threads passed\n", rounds, kThreads);
    return 0;
}
