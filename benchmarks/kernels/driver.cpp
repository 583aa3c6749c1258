// What is timed inside the process, without the cost of a call from Python: our
// kernels over many copies of a weight, and the machine's own limits. Loaded by
// benchmarks/kernels/bench.py.
#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>

#include <atomic>
#include <condition_variable>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

#include "kernels/matmul.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define BENCH_EXPORT extern "C" __attribute__((visibility("default")))

namespace {

// Processor time of the calling thread instead of the time that passes.
std::atomic<bool> processor_time{false};

double now() {
  timespec time;
  clock_gettime(processor_time ? CLOCK_THREAD_CPUTIME_ID : CLOCK_MONOTONIC,
                &time);
  return (double)time.tv_sec + 1e-9 * (double)time.tv_nsec;
}

// Threads that spin for work, as an inference runtime's do, but only between
// wake and rest: what is measured next finds the processors idle.
class Pool {
public:
  explicit Pool(int threads) : threads_(threads) {
    for (int i = 1; i < threads; i++)
      workers_.emplace_back([this, i] { serve(i); });
  }
  ~Pool() {
    wake();
    stop_ = true;
    for (auto &worker : workers_)
      worker.join();
  }
  // Returns when all threads spin.
  void wake() {
    {
      std::lock_guard<std::mutex> lock(mutex_);
      resting_ = false;
    }
    awake_.notify_all();
    run(threads_, [](int64_t) {});
  }
  void rest() { resting_ = true; }
  // Calls task(unit) for all units; threads take the next one as they get free.
  void run(int64_t units, const std::function<void(int64_t)> &task) {
    if (threads_ == 1 || units == 1) {
      for (int64_t i = 0; i < units; i++)
        task(i);
      return;
    }
    task_ = &task;
    units_ = units;
    next_ = 0;
    left_ = threads_ - 1;
    round_.fetch_add(1, std::memory_order_release);
    work();
    while (left_.load(std::memory_order_acquire) != 0)
      pause();
  }

private:
  static void pause() {
#if defined(__x86_64__)
    _mm_pause();
#endif
  }
  void work() {
    for (int64_t i = next_++; i < units_; i = next_++)
      (*task_)(i);
  }
  void serve(int) {
    int64_t seen = 0;
    while (!stop_.load(std::memory_order_relaxed)) {
      const int64_t round = round_.load(std::memory_order_acquire);
      if (round == seen) {
        if (resting_.load(std::memory_order_relaxed)) {
          std::unique_lock<std::mutex> lock(mutex_);
          awake_.wait(lock, [this] { return !resting_; });
        }
        pause();
        continue;
      }
      seen = round;
      work();
      left_.fetch_sub(1, std::memory_order_release);
    }
  }
  const int threads_;
  std::vector<std::thread> workers_;
  const std::function<void(int64_t)> *task_ = nullptr;
  int64_t units_ = 0;
  std::atomic<int64_t> next_{0}, round_{0};
  std::atomic<int> left_{0};
  std::atomic<bool> stop_{false}, resting_{true};
  std::mutex mutex_;
  std::condition_variable awake_;
};

// A pool that is awake for the time of one measurement.
struct Awake {
  explicit Awake(void *pool) : pool(*(Pool *)pool) { this->pool.wake(); }
  ~Awake() { pool.rest(); }
  Pool &pool;
};

} // namespace

// A pool of threads for the calls below.
BENCH_EXPORT void *bench_pool(int32_t threads) { return new Pool(threads); }
BENCH_EXPORT void bench_processor_time(int32_t yes) {
  processor_time = yes != 0;
}
BENCH_EXPORT void bench_free_pool(void *pool) { delete (Pool *)pool; }

// Products of a [m, K] with each of `copies` packed weights, `step` bytes
// apart, one after the other. Seconds for all of them, or -1.
BENCH_EXPORT double bench_matmul(void *pool, const uint8_t *packed,
                                 int64_t packed_bytes, int64_t step,
                                 int64_t copies, const float *a, float *y,
                                 int64_t m, int32_t accuracy, int32_t isa,
                                 int32_t threads, void *scratch,
                                 int64_t scratch_bytes) {
  const Awake awake(pool);
  Pool &workers = awake.pool;
  const double start = now();
  for (int64_t i = 0; i < copies; i++) {
    osl::MatMulProblem problem = {};
    if (osl::parse_packed_weight(packed + i * step, (size_t)packed_bytes,
                                 &problem.b) != nullptr)
      return -1;
    problem.a = a;
    problem.y = y;
    problem.m = m;
    problem.a_stride = problem.b.rows;
    problem.y_stride = problem.b.columns;
    problem.accuracy = (osl::Accuracy)accuracy;
    osl::MatMulPlan plan;
    if (osl::plan_matmul(problem, threads, (osl::KernelIsa)isa, &plan) !=
        nullptr)
      return -1;
    if (plan.scratch_bytes > scratch_bytes)
      return -1;
    workers.run(plan.prepare_units, [&](int64_t unit) {
      osl::prepare_matmul(problem, plan, scratch, unit, unit + 1);
    });
    workers.run(plan.run_units, [&](int64_t unit) {
      osl::run_matmul(problem, plan, scratch, unit, unit + 1);
    });
  }
  return now() - start;
}

BENCH_EXPORT int64_t bench_scratch_bytes(const uint8_t *packed,
                                         int64_t packed_bytes, int64_t m,
                                         int32_t accuracy, int32_t isa,
                                         int32_t threads) {
  osl::MatMulProblem problem = {};
  float nothing = 0;
  if (osl::parse_packed_weight(packed, (size_t)packed_bytes, &problem.b) !=
      nullptr)
    return -1;
  problem.a = &nothing;
  problem.y = &nothing;
  problem.m = m;
  problem.a_stride = problem.b.rows;
  problem.y_stride = problem.b.columns;
  problem.accuracy = (osl::Accuracy)accuracy;
  osl::MatMulPlan plan;
  if (osl::plan_matmul(problem, threads, (osl::KernelIsa)isa, &plan) != nullptr)
    return -1;
  return plan.scratch_bytes;
}

#if defined(__x86_64__)

namespace {

std::atomic<int64_t> sink{0};

__attribute__((target("avx512f"))) void read_wide(const char *p,
                                                  int64_t bytes) {
  __m512i sum[4] = {};
  for (int64_t i = 0; i + 512 <= bytes; i += 512) {
    for (int64_t line = 0; line < 512; line += 64)
      _mm_prefetch(p + i + 4096 + line, _MM_HINT_T0);
    for (int64_t line = 0; line < 512; line += 64)
      sum[line / 64 % 4] = _mm512_add_epi32(sum[line / 64 % 4],
                                            _mm512_loadu_si512(p + i + line));
  }
  sink += _mm512_reduce_add_epi32(_mm512_add_epi32(
      _mm512_add_epi32(sum[0], sum[1]), _mm512_add_epi32(sum[2], sum[3])));
}

__attribute__((target("avx2"))) void read_narrow(const char *p, int64_t bytes) {
  __m256i sum[4] = {};
  for (int64_t i = 0; i + 512 <= bytes; i += 512) {
    for (int64_t line = 0; line < 512; line += 64)
      _mm_prefetch(p + i + 4096 + line, _MM_HINT_T0);
    for (int64_t half = 0; half < 512; half += 32)
      sum[half / 32 % 4] =
          _mm256_add_epi32(sum[half / 32 % 4],
                           _mm256_loadu_si256((const __m256i *)(p + i + half)));
  }
  const __m256i all = _mm256_add_epi32(_mm256_add_epi32(sum[0], sum[1]),
                                       _mm256_add_epi32(sum[2], sum[3]));
  sink += _mm256_extract_epi32(all, 0);
}

// Loops of `times` independent instructions on twelve registers (four tiles).
#define TWELVE(OP)                                                             \
  OP(0) OP(1) OP(2) OP(3) OP(4) OP(5) OP(6) OP(7) OP(8) OP(9) OP(10) OP(11)
#define CLOBBERED                                                              \
  "cc", "memory", "xmm0", "xmm1", "xmm2", "xmm3", "xmm4", "xmm5", "xmm6",      \
      "xmm7", "xmm8", "xmm9", "xmm10", "xmm11", "xmm14", "xmm15"
#define LOOP(CLEAR, REGISTER, OP)                                              \
  __asm__ volatile(                                                            \
      TWELVE(CLEAR) "vpxor %%xmm14, %%xmm14, %%xmm14\n\t vpxor %%xmm15, "      \
                    "%%xmm15, %%xmm15\n\t 1:\n\t" TWELVE(                      \
                        OP) "dec %0\n\t jnz 1b\n\t vzeroupper\n\t"             \
      : "+r"(times)                                                            \
      :                                                                        \
      : CLOBBERED)
#define CLEAR(i) "vpxor %%xmm" #i ", %%xmm" #i ", %%xmm" #i "\n\t"
#define DOT_512(i) "vpdpbusd %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define DOT_256(i) "%{vex%} vpdpbusd %%ymm14, %%ymm15, %%ymm" #i "\n\t"
#define FMA_512(i) "vfmadd231ps %%zmm14, %%zmm15, %%zmm" #i "\n\t"
#define FMA_256(i) "vfmadd231ps %%ymm14, %%ymm15, %%ymm" #i "\n\t"
// The widest int8 step of plain AVX2: products of bytes to pairs, added up in
// 16 bits.
#define MADD_256(i)                                                            \
  "vpmaddubsw %%ymm14, %%ymm15, %%ymm12\n\t vpaddw %%ymm12, %%ymm" #i          \
  ", %%ymm" #i "\n\t"

void vnni_512(int64_t times) { LOOP(CLEAR, zmm, DOT_512); }
void vnni_256(int64_t times) { LOOP(CLEAR, ymm, DOT_256); }
void fma_512(int64_t times) { LOOP(CLEAR, zmm, FMA_512); }
void fma_256(int64_t times) { LOOP(CLEAR, ymm, FMA_256); }
void madd_256(int64_t times) { LOOP(CLEAR, ymm, MADD_256); }

struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Random numbers of order one, as int8 or bfloat16: zeros draw less power and
// might be clocked higher than real work.
struct alignas(64) Operands {
  uint16_t values[4][512];
  Operands() {
    uint32_t state = 1;
    for (auto &tile : values)
      for (auto &value : tile) {
        state = state * 1664525u + 1013904223u;
        value = (uint16_t)((state >> 16 & 0x80FF) | 0x3F00);
      }
  }
};

#define TILES_BEGIN                                                            \
  const TileConfig config;                                                     \
  static const Operands operands;                                              \
  __asm__ volatile("ldtilecfg %0" ::"m"(config));                              \
  _tile_zero(0);                                                               \
  _tile_zero(1);                                                               \
  _tile_zero(2);                                                               \
  _tile_zero(3);                                                               \
  _tile_loadd(4, operands.values[0], 64);                                      \
  _tile_loadd(5, operands.values[1], 64);                                      \
  _tile_loadd(6, operands.values[2], 64);                                      \
  _tile_loadd(7, operands.values[3], 64)

__attribute__((target("amx-tile,amx-int8"))) void amx_int8(int64_t times) {
  TILES_BEGIN;
  for (int64_t i = 0; i < times; i++) {
    _tile_dpbssd(0, 4, 6);
    _tile_dpbssd(1, 4, 7);
    _tile_dpbssd(2, 5, 6);
    _tile_dpbssd(3, 5, 7);
  }
  _tile_release();
}

__attribute__((target("amx-tile,amx-bf16"))) void amx_bf16(int64_t times) {
  TILES_BEGIN;
  for (int64_t i = 0; i < times; i++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  _tile_release();
}

struct Peak {
  const char *name;
  void (*loop)(int64_t);
  double operations; // of one turn
  osl::KernelIsa isa;
};

constexpr double kTileProducts = 4.0 * 16 * 16;
const Peak kPeaks[] = {
    {"avx2_fma", fma_256, 12 * 8 * 2, osl::kIsaAvx2},
    {"avx2_int8", madd_256, 12 * 32 * 2, osl::kIsaAvx2},
    {"avxvnni_int8", vnni_256, 12 * 32 * 2, osl::kIsaAvxVnni},
    {"avx512_fma", fma_512, 12 * 16 * 2, osl::kIsaAvx512Vnni},
    {"avx512vnni_int8", vnni_512, 12 * 64 * 2, osl::kIsaAvx512Vnni},
    {"amx_int8", amx_int8, kTileProducts * 64 * 2, osl::kIsaAmx},
    {"amx_bf16", amx_bf16, kTileProducts * 32 * 2, osl::kIsaAmx},
};

} // namespace

// Name of limit `index`, or null beyond the last.
BENCH_EXPORT const char *bench_peak_name(int32_t index) {
  return index >= 0 && index < (int32_t)(sizeof kPeaks / sizeof *kPeaks)
             ? kPeaks[index].name
             : nullptr;
}

// Operations per second on all threads of the pool; 0 where this machine lacks
// the instructions.
BENCH_EXPORT double bench_peak(void *pool, int32_t threads, int32_t index) {
  const Peak &peak = kPeaks[index];
  if (!osl::supports(peak.isa))
    return 0;
  constexpr int64_t kTurns = 100000;
  const Awake awake(pool);
  const double start = now();
  awake.pool.run(threads, [&](int64_t) { peak.loop(kTurns); });
  return peak.operations * kTurns * threads / (now() - start);
}

// Seconds that all threads of the pool take to read a buffer once.
BENCH_EXPORT double bench_read(void *pool, int32_t threads, const char *buffer,
                               int64_t bytes) {
  const auto read =
      osl::supports(osl::kIsaAvx512Vnni) ? read_wide : read_narrow;
  const int64_t parts = threads * 8, part = bytes / parts / 4096 * 4096;
  const Awake awake(pool);
  const double start = now();
  awake.pool.run(parts, [&](int64_t i) {
    read(buffer + i * part, i + 1 < parts ? part : bytes - i * part);
  });
  return now() - start;
}

#endif
