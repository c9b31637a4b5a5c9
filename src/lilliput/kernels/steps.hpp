// Threads that walk through the same steps of a computation together, with a few hundred nanoseconds between two steps.
//
// Every thread calls `share` for the same steps in the same order. A step's units are handed out one by one, and nobody
// goes on before all are done; who comes late finds them done and skips them, so that nobody waits for a thread that the
// system has not woken yet.
#pragma once

#include <array>
#include <atomic>
#include <cstdint>
#include <thread>

#include "thread_pool.hpp"

namespace lilliput {

/// What the threads of one walk share; serves one walk.
class Steps {
 public:
  explicit Steps(int threads) : threads_(threads < kMaxThreads ? threads : kMaxThreads) {}

 private:
  friend class Walker;
  struct alignas(64) Range {
    std::atomic<uint64_t> taken{0};  // step in the high bits, units taken of it in the low ones
  };
  std::array<Range, kMaxThreads> ranges_;
  alignas(64) std::atomic<int64_t> done_{0};  // units of all steps
  int threads_;
};

/// One thread's way through the steps.
class Walker {
 public:
  Walker(Steps& steps, int thread) : steps_(steps), thread_(thread) {}

  int threads() const { return steps_.threads_; }
  int thread() const { return thread_; }

  /// One step: `part(first, last)` covers 0 .. count-1 in units of `grain`. Each thread begins in a range that is always
  /// its own, so that its cache keeps it, and then helps the others.
  template <class Part>
  void share(int64_t count, int64_t grain, const Part& part) {
    if (count == 0) return;
    if (threads() == 1) return part(0, count);
    const int64_t units = (count + grain - 1) / grain;
    ++step_;
    target_ += units;
    if (steps_.done_.load(std::memory_order_acquire) < target_) {
      work(units, count, grain, part);
      wait();
    }
  }

 private:
  static constexpr int kUnitBits = 24;

  template <class Part>
  void work(int64_t units, int64_t count, int64_t grain, const Part& part) {
    int64_t finished = 0;
    for (int i = 0; i < threads(); ++i) {
      const int owner = (thread_ + i) % threads();
      const int64_t first = units * owner / threads(), size = units * (owner + 1) / threads() - first;
      for (int64_t unit; (unit = take(owner, size)) >= 0; ++finished) {
        const int64_t start = (first + unit) * grain;
        part(start, start + grain < count ? start + grain : count);
      }
    }
    if (finished) steps_.done_.fetch_add(finished, std::memory_order_acq_rel);
  }

  /// The next unit of a range in this step, -1 when there is none.
  int64_t take(int owner, int64_t size) {
    std::atomic<uint64_t>& taken = steps_.ranges_[owner].taken;
    uint64_t seen = taken.load(std::memory_order_relaxed);
    while (true) {
      const uint64_t step = seen >> kUnitBits;
      const uint64_t unit = step == step_ ? seen & ((1u << kUnitBits) - 1) : 0;
      if (step > step_ || static_cast<int64_t>(unit) >= size) return -1;
      if (taken.compare_exchange_weak(seen, (step_ << kUnitBits) + unit + 1, std::memory_order_relaxed)) return unit;
    }
  }

  void wait() const {
    for (int looks = 1; steps_.done_.load(std::memory_order_acquire) < target_; ++looks) {
      if (looks % 4096 == 0) {
        std::this_thread::yield();
      } else {
#if defined(__x86_64__)
        __builtin_ia32_pause();
#endif
      }
    }
  }

  Steps& steps_;
  int thread_;
  uint64_t step_ = 0;
  int64_t target_ = 0;
};

}  // namespace lilliput
