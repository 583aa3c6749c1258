// How many threads a session may use: it does not tell.
#pragma once

#include <cstdint>

#if defined(__linux__)
#include <sched.h>
#endif
#include <thread>

namespace osl::ort {

// The processors of this process. A session with fewer threads gets more, smaller pieces of work than it needs.
inline int64_t usable_threads() {
#if defined(__linux__)
    cpu_set_t set;
    if (sched_getaffinity(0, sizeof(set), &set) == 0) return CPU_COUNT(&set);
#endif
    const unsigned count = std::thread::hardware_concurrency();
    return count == 0 ? 1 : count;
}

}  // namespace osl::ort
