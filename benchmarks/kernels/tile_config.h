// For building llama.cpp with GCC 12: its _tile_loadconfig declares 8 bytes of
// the 64 that ldtilecfg reads, so that the compiler drops the stores of the
// others and the processor refuses the rest of the stack as a configuration.
//
//   export CXXFLAGS="-include $PWD/benchmarks/kernels/tile_config.h"
//   pip install --no-binary llama-cpp-python llama-cpp-python
#pragma once

#if defined(__GNUC__) && !defined(__clang__) && defined(__AMX_TILE__)
#include <immintrin.h>

static inline void load_whole_tile_config(const void *config) {
  __asm__ volatile("ldtilecfg %0" ::"m"(*(const char(*)[64])config));
}
#define _tile_loadconfig load_whole_tile_config
#endif
