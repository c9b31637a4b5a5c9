#include "thread_pool.hpp"

#include <pthread.h>

#include <chrono>
#include <mutex>
#include <thread>

namespace lilliput {
namespace {

constexpr auto kSpin = std::chrono::microseconds(60);
constexpr int kPausesPerLook = 32;

// The state of a pool: generation of the job (16 bits), whether it may still be joined, number of workers inside.
constexpr uint32_t kGeneration = 1u << 16, kOpen = 1u << 15, kInside = kOpen - 1;

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

class Pool {
 public:
  void run(int threads, void (*body)(void*, int), void* context) {
    std::unique_lock<std::mutex> alone(busy_, std::try_to_lock);
    if (!alone.owns_lock()) return body(context, 0);
    for (; workers_ < threads - 1; ++workers_) std::thread(&Pool::work, this, workers_ + 1).detach();
    body_ = body;
    context_ = context;
    threads_ = threads;
    state_.store((state_.load(std::memory_order_relaxed) & ~(kGeneration - 1)) + kGeneration + kOpen);
    state_.notify_all();
    body(context, 0);
    state_.fetch_and(~kOpen);
    wait_until_left();
  }

 private:
  [[noreturn]] void work(int index) {
    uint32_t done = 0;
    while (true) {
      uint32_t seen = await_job(done);
      done = seen & ~(kGeneration - 1);
      while ((seen & kOpen) && (seen & ~(kGeneration - 1)) == done) {
        if (!state_.compare_exchange_weak(seen, seen + 1)) continue;
        if (index < threads_) body_(context_, index);
        state_.fetch_sub(1);
        break;
      }
    }
  }

  /// The state once its generation is another one: looks for kSpin, then sleeps.
  uint32_t await_job(uint32_t done) {
    const auto end = std::chrono::steady_clock::now() + kSpin;
    while (true) {
      for (int i = 0; i < kPausesPerLook; ++i) {
        const uint32_t seen = state_.load(std::memory_order_acquire);
        if ((seen & ~(kGeneration - 1)) != done) return seen;
        pause();
      }
      if (std::chrono::steady_clock::now() > end) break;
    }
    uint32_t seen;
    while (((seen = state_.load()) & ~(kGeneration - 1)) == done) state_.wait(seen);
    return seen;
  }

  void wait_until_left() {
    for (int looks = 0; state_.load(std::memory_order_acquire) & kInside; ++looks) {
      looks % 1024 == 1023 ? std::this_thread::yield() : pause();
    }
  }

  std::mutex busy_;
  int workers_ = 0;
  void (*body_)(void*, int) = nullptr;
  void* context_ = nullptr;
  int threads_ = 0;
  std::atomic<uint32_t> state_{0};
};

// Never destroyed: its workers outlive static destructors, and a forked child leaves the parent's pool behind.
std::atomic<Pool*> pool{nullptr};

Pool* make_pool() {
  static std::once_flag once;
  std::call_once(once, [] {
    pool = new Pool;
    pthread_atfork(nullptr, nullptr, [] { pool = new Pool; });
  });
  return pool;
}

}  // namespace

void run_on_threads(int threads, void (*body)(void*, int), void* context) {
  Pool* current = pool.load(std::memory_order_acquire);
  (current ? current : make_pool())->run(std::min(threads, kMaxThreads), body, context);
}

}  // namespace lilliput
