// Packed weights and their products without Python, for sanitizers and for
// emulated processors: every instruction set against the scalar kernels, in
// buffers that end where the data ends. Exits with 1 at the first difference.
//
//     kernel_test [rounds = 200]
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include <cmath>
#include <memory>
#include <random>
#include <vector>

#include "kernels/kernel_set.h"
#include "kernels/matmul.h"

namespace {

using namespace osl;

const char *const kIsaNames[kKernelIsas] = {
    "auto",       "scalar", "avx2",         "avxvnni",
    "avx512vnni", "amx",    "neon_dotprod", "neon_i8mm"};

std::mt19937 rng(20261120);

int64_t below(int64_t limit) { return (int64_t)(rng() % (uint64_t)limit); }

template <class T> T one_of(std::initializer_list<T> values) {
  return values.begin()[below((int64_t)values.size())];
}

[[noreturn]] void fail(const char *what, const PackedScheme &s,
                       const MatMulProblem &p, KernelIsa isa) {
  printf("FAILED %s: isa %s, bits %d, block %d, scales %d, zero points %d, K "
         "%lld, N %lld, m %lld, accuracy %d, "
         "activation %d, type %d\n",
         what, kIsaNames[isa], s.bits, s.block, s.scale_type, s.zero_points,
         (long long)p.b.rows, (long long)p.b.columns, (long long)p.m,
         p.accuracy, p.activation, p.type);
  exit(1);
}

struct Weight {
  PackedScheme scheme;
  ColumnOrder order;
  int64_t rows, columns;
  std::vector<uint8_t> codes, scales, zeros;
  std::vector<uint8_t> packed; // exactly as long as it says

  NBitsArrays arrays() {
    return {codes.data(), scales.data(),
            scheme.zero_points ? zeros.data() : nullptr};
  }
};

Weight random_weight() {
  Weight w;
  w.scheme = {one_of({4, 4, 8, 3, 2}), one_of({16, 32, 64, 128, 256}),
              one_of({kScaleFloat32, kScaleFloat16, kScaleBfloat16}),
              below(2) == 1};
  w.order = below(3) == 0 ? kPairedHalves : kPlainColumns;
  w.rows = 1 + below(700);
  w.columns = 1 + below(70);
  if (w.order == kPairedHalves)
    w.columns *= 2;
  const int64_t blocks = (w.rows + w.scheme.block - 1) / w.scheme.block;
  w.codes.resize(
      (size_t)(w.columns * blocks * w.scheme.block * w.scheme.bits / 8));
  for (auto &byte : w.codes)
    byte = (uint8_t)rng();
  w.zeros.resize((size_t)(w.columns * ((blocks * w.scheme.bits + 7) / 8)));
  for (auto &byte : w.zeros)
    byte = (uint8_t)rng();
  w.scales.resize(
      (size_t)(w.columns * blocks * scale_bytes(w.scheme.scale_type)));
  for (int64_t i = 0; i < w.columns * blocks; i++) {
    // About 0.01 in each type; some are zero.
    const float value =
        below(9) == 0 ? 0.0f : 0.005f + 0.01f * (float)below(1000) / 1000.0f;
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint16_t half =
        value == 0 ? 0 : (uint16_t)(((bits >> 13) & 0x7FFF) - (112 << 10));
    const uint16_t bfloat = (uint16_t)(bits >> 16);
    uint8_t *to = w.scales.data() + i * scale_bytes(w.scheme.scale_type);
    if (w.scheme.scale_type == kScaleFloat32)
      memcpy(to, &value, 4);
    if (w.scheme.scale_type == kScaleFloat16)
      memcpy(to, &half, 2);
    if (w.scheme.scale_type == kScaleBfloat16)
      memcpy(to, &bfloat, 2);
  }
  w.packed.resize(
      (size_t)packed_weight_bytes(w.scheme, w.rows, w.columns, w.order));
  pack_weight(w.arrays(), w.scheme, w.rows, w.columns, w.order, 0,
              strip_count(w.columns, w.order), w.packed.data());
  return w;
}

void check_round_trip(Weight &w) {
  PackedWeight view;
  MatMulProblem none = {};
  if (parse_packed_weight(w.packed.data(), w.packed.size(), &view))
    fail("parse", w.scheme, none, kAutoIsa);
  Weight back = w;
  unpack_weight(view, 0, view.strips_count, back.arrays());
  std::vector<uint8_t> again(w.packed.size());
  pack_weight(back.arrays(), w.scheme, w.rows, w.columns, w.order, 0,
              view.strips_count, again.data());
  if (again != w.packed || back.scales != w.scales)
    fail("round trip", w.scheme, none, kAutoIsa);
}

// Whatever the bytes are, the parser says no or describes memory that is there.
void check_hostile_header(const Weight &w) {
  std::vector<uint8_t> bytes = w.packed;
  for (int i = 0; i < 50; i++) {
    bytes[(size_t)below(64)] ^= (uint8_t)(1u << below(8));
    const size_t size =
        below(2) ? bytes.size() : (size_t)below((int64_t)bytes.size() + 1);
    PackedWeight view;
    if (parse_packed_weight(bytes.data(), size, &view))
      continue;
    if (64 + view.strip_bytes * view.strips_count != (int64_t)size) {
      printf("FAILED: a header was accepted that describes other memory\n");
      exit(1);
    }
  }
}

// The zero point of its block for about `percent` of a weight's codes.
void thin_out(Weight &w, int64_t percent) {
  PackedWeight view;
  parse_packed_weight(w.packed.data(), w.packed.size(), &view);
  for (int64_t strip = 0; strip < view.strips_count; strip++)
    for (int32_t c = 0; c < view.chunks; c++) {
      uint8_t *chunk = w.packed.data() + sizeof(PackedHeader) +
                       strip * view.strip_bytes + c * view.chunk_bytes;
      for (int32_t k = 0; k < view.chunk_rows; k++)
        for (int32_t column = 0; column < kStripColumns; column++) {
          if (below(100) >= percent)
            continue;
          const CodePlace place = code_place(w.scheme.bits, k, column);
          const int32_t zero =
              zero_point(view, chunk, k >> view.block_shift, column);
          const int32_t mask = (1 << w.scheme.bits) - 1;
          chunk[place.byte] =
              (uint8_t)((chunk[place.byte] & ~(mask << place.shift)) |
                        zero << place.shift);
        }
    }
}

std::vector<uint8_t> sparse_of(const Weight &w) {
  PackedWeight view;
  parse_packed_weight(w.packed.data(), w.packed.size(), &view);
  const int64_t bytes = sparse_weight_bytes(view);
  if (bytes < 0)
    return {};
  std::vector<uint8_t> sparse((size_t)bytes);
  make_sparse(view, bytes, sparse.data());
  return sparse;
}

// The sparse form comes back as it was, on every instruction set.
void check_sparse(const Weight &w, const std::vector<uint8_t> &sparse) {
  MatMulProblem none = {};
  SparseWeight view;
  if (parse_sparse_weight(sparse.data(), sparse.size(), &view))
    fail("parse sparse", w.scheme, none, kAutoIsa);
  for (int32_t isa = kIsaScalar; isa < kKernelIsas; isa++) {
    if (!supports((KernelIsa)isa))
      continue;
    std::vector<uint8_t> back((size_t)expanded_bytes(view));
    expand_weight(view, (KernelIsa)isa, back.data());
    if (back != w.packed)
      fail("expand", w.scheme, none, (KernelIsa)isa);
  }
}

// Whatever the header, the table and the bitmaps are: the parser says no, or
// all that it lets by can be expanded.
void check_hostile_sparse(const Weight &w, const std::vector<uint8_t> &sparse) {
  for (int i = 0; i < 20; i++) {
    std::vector<uint8_t> bytes = sparse;
    const int64_t table = 64 + 8 * (strip_count(w.columns, w.order) + 1);
    const int64_t reach = below(3) ? (int64_t)bytes.size() : table;
    for (int64_t flips = 1 + below(4); flips > 0; flips--)
      bytes[(size_t)below(reach)] ^= (uint8_t)(1u << below(8));
    if (below(3) == 0)
      bytes.resize((size_t)below((int64_t)bytes.size() + 1));
    SparseWeight view;
    if (parse_sparse_weight(bytes.data(), bytes.size(), &view))
      continue;
    for (int32_t isa = kIsaScalar; isa < kKernelIsas; isa++) {
      if (!supports((KernelIsa)isa))
        continue;
      std::vector<uint8_t> back((size_t)expanded_bytes(view));
      expand_weight(view, (KernelIsa)isa, back.data());
    }
  }
}

void compute(const MatMulProblem &p, KernelIsa isa, int64_t threads) {
  MatMulPlan plan;
  if (const char *error = plan_matmul(p, threads, isa, &plan)) {
    printf("FAILED plan: %s\n", error);
    exit(1);
  }
  const std::unique_ptr<uint8_t[]> scratch(
      new uint8_t[(size_t)plan.scratch_bytes]);
  for (int64_t unit = 0; unit < plan.prepare_units; unit++)
    prepare_matmul(p, plan, scratch.get(), unit, unit + 1);
  for (int64_t unit = plan.run_units; unit > 0; unit--)
    run_matmul(p, plan, scratch.get(), unit - 1, unit);
}

std::vector<float> random_floats(int64_t count, bool odd) {
  std::normal_distribution<float> normal;
  std::vector<float> values((size_t)count);
  for (auto &v : values)
    v = normal(rng);
  if (odd)
    for (int64_t i = 0; i < count; i += 1 + below(40))
      values[(size_t)i] = one_of(
          {0.0f, -0.0f, 1e-42f, 1e-38f, 1e30f, NAN, INFINITY, -INFINITY});
  return values;
}

// The int8 mode has the scalar kernels' bits; floats differ by what their sums
// can lose: K additions of terms whose sum of magnitudes is bounded by `size`,
// each within 2^-23 of its result, and 2^-8 more where operands become
// bfloat16.
void compare(const std::vector<float> &expected,
             const std::vector<float> &actual, const std::vector<float> &size,
             bool exact, double relative, const Weight &w,
             const MatMulProblem &p, KernelIsa isa) {
  for (size_t i = 0; i < expected.size(); i++) {
    const float e = expected[i], a = actual[i];
    if (std::isnan(e) && std::isnan(a))
      continue;
    if (exact ? memcmp(&e, &a, sizeof e) != 0
              : !(std::fabs((double)e - a) <= relative * size[i] + 1e-30))
      fail(exact ? "bits" : "bound", w.scheme, p, isa);
  }
}

void check_products(const Weight &w, const std::vector<uint8_t> &sparse) {
  MatMulProblem p = {};
  parse_packed_weight(w.packed.data(), w.packed.size(), &p.b);
  p.m = one_of({1, 1, 2, 3, 5, 8, 10, 11, 15, 16, 17, 31, 33, 40, 70});
  p.accuracy = one_of({kExact, kBf16, kInt8, kInt8});
  p.activation = one_of({kNoActivation, kSilu, kGelu, kGeluTanh});
  if (w.order == kPairedHalves && below(2))
    p.activation = one_of({kSiluGate, kGeluGate, kGeluTanhGate});
  const bool odd = p.accuracy == kInt8 && below(4) == 0;
  const auto a = random_floats(p.m * w.rows, odd);
  const int64_t columns = output_columns(p.b, p.activation);
  const auto bias = random_floats(w.columns, false),
             residual = random_floats(p.m * columns, false);
  p.rank = below(3) == 0 ? 1 + below(5) : 0;
  const auto u = random_floats(w.rows * (p.rank + 1), false),
             v = random_floats((p.rank + 1) * w.columns, false);
  p.low_rank_u = u.data();
  p.low_rank_v = v.data();
  p.a = a.data();
  p.a_stride = w.rows;
  p.y_stride = columns;
  if (below(2))
    p.bias = bias.data();
  if (below(2)) {
    p.residual = residual.data();
    p.residual_stride = columns;
  }
  const bool plain =
      p.activation == kNoActivation && p.rank == 0 && !p.bias && !p.residual;

  // The sum of the magnitudes of all terms of a result: the product of
  // magnitudes, by the scalar kernel.
  std::vector<float> expected((size_t)(p.m * columns)), actual = expected,
                                                        size = expected;
  p.y = expected.data();
  compute(p, kIsaScalar, 1);
  for (size_t i = 0; i < size.size(); i++) {
    double sum = 1 + std::fabs(expected[i]);
    for (int64_t k = 0; k < w.rows; k++) {
      const double x =
          std::fabs(a[i / (size_t)columns * (size_t)w.rows + (size_t)k]);
      sum += (std::isfinite(x) ? x : 0) * 0.015 * (1 << w.scheme.bits);
    }
    // A gate multiplies two such results, activations stretch differences by at
    // most 1.2.
    size[i] =
        (float)(p.activation >= kSiluGate ? 1.2 * 2 * sum * sum : 1.2 * sum);
  }
  for (int32_t isa = kIsaScalar; isa < kKernelIsas; isa++) {
    if (!supports((KernelIsa)isa))
      continue;
    std::fill(actual.begin(), actual.end(), -1.0f);
    p.y = actual.data();
    compute(p, (KernelIsa)isa, 1 + below(4));
    MatMulPlan plan;
    plan_matmul(p, 1, (KernelIsa)isa, &plan);
    const bool bf16 = plan.method == kMethodAmxBf16;
    const bool same_bits = p.accuracy == kInt8 && !bf16;
    if (odd && bf16)
      continue; // other rules for what is not finite
    // Rounding int8 activations is worth 1 / 254 of the largest of a block,
    // bfloat16 2^-8 of each factor.
    const double relative =
        bf16 ? 2.0 / 128 + 1.0 / 64 : (double)w.rows * 0x1p-23;
    compare(expected, actual, size, same_bits, relative, w, p, (KernelIsa)isa);
    SparseWeight codes;
    if (!sparse.empty() &&
        !parse_sparse_weight(sparse.data(), sparse.size(), &codes)) {
      MatMulProblem same = p;
      std::vector<float> again(actual.size(), -1.0f);
      same.b = codes.packed;
      same.sparse = &codes;
      same.y = again.data();
      compute(same, (KernelIsa)isa, 1 + below(4));
      compare(actual, again, size, true, 0, w, p, (KernelIsa)isa);
    }
    if (plain && p.m == 1 &&
        same_bits) { // a row alone gives what it gives among others
      MatMulProblem twice = p;
      std::vector<float> rows(a), both((size_t)(2 * columns));
      rows.insert(rows.end(), a.begin(), a.end());
      twice.a = rows.data();
      twice.m = 2;
      twice.y = both.data();
      compute(twice, (KernelIsa)isa, 2);
      compare(expected, std::vector<float>(both.begin() + columns, both.end()),
              size, true, 0, w, p, (KernelIsa)isa);
    }
  }
}

} // namespace

int main(int argc, char **argv) {
  const int rounds = argc > 1 ? atoi(argv[1]) : 200;
  for (int32_t isa = kIsaScalar; isa < kKernelIsas; isa++)
    if (supports((KernelIsa)isa))
      printf("%s ", kIsaNames[isa]);
  for (int round = 0; round < rounds; round++) {
    Weight w = random_weight();
    check_round_trip(w);
    check_hostile_header(w);
    check_products(w, {});
    if (w.scheme.bits == 4 || w.scheme.bits == 8) {
      thin_out(w, below(101));
      const auto sparse = sparse_of(w);
      check_sparse(w, sparse);
      check_hostile_sparse(w, sparse);
      check_products(w, sparse);
    }
  }
  printf("- %d rounds passed\n", rounds);
  return 0;
}
