// The threads of all kernels: they look for work for a short while, then sleep, so that torch's own can have the cores.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>

namespace lilliput {

constexpr int kMaxThreads = 64;

/// Runs `body(context, i)` in the calling thread (i = 0) and, as far as they wake in time, in the workers 1 .. threads-1.
/// The body must hand out its work by itself: a worker that comes late is not waited for. A call while another thread's
/// call runs has no workers. After a fork the child starts workers of its own.
void run_on_threads(int threads, void (*body)(void* context, int thread), void* context);

/// Calls `part(first, last)` until 0 .. count-1 is covered, in steps of `grain`. Each thread starts in a range that is
/// always its own, so that its cache keeps it, and then helps the others.
template <class Part>
void parallel_for(int64_t count, int64_t grain, int threads, const Part& part) {
  const int64_t steps = (count + grain - 1) / grain;
  threads = static_cast<int>(std::min<int64_t>({threads, steps, kMaxThreads}));
  if (threads <= 1) {
    if (count > 0) part(0, count);
    return;
  }
  struct alignas(64) Range {
    std::atomic<int64_t> next;
    int64_t last;
  };
  struct Job {
    Range ranges[kMaxThreads];
    int threads;
    int64_t count, grain;
    const Part& part;
  } job{{}, threads, count, grain, part};
  for (int i = 0; i < threads; ++i) {
    job.ranges[i].next.store(steps * i / threads, std::memory_order_relaxed);
    job.ranges[i].last = steps * (i + 1) / threads;
  }
  run_on_threads(
      threads,
      [](void* context, int thread) {
        Job& job = *static_cast<Job*>(context);
        for (int i = 0; i < job.threads; ++i) {
          Range& range = job.ranges[(thread + i) % job.threads];
          while (true) {
            const int64_t step = range.next.fetch_add(1, std::memory_order_relaxed);
            if (step >= range.last) break;
            job.part(step * job.grain, std::min(job.count, (step + 1) * job.grain));
          }
        }
      },
      &job);
}

}  // namespace lilliput
