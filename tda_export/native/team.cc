#include "team.h"

#include <algorithm>

#include <sched.h>

namespace tda {
namespace {

constexpr int kPatience = 4096;  // looks, before the processor is offered to other threads

// Wait a moment for another thread.
void Pause(int& looks) {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
  if (++looks % kPatience == 0) sched_yield();
}

}  // namespace

// Take a task of the present loop and do it. Returns whether there was one.
bool Team::TakeTask() {
  const auto left = [](uint64_t loop) { return (loop & kTasks) < (loop >> kTaskBits & kTasks); };
  if (!left(loop_.load(std::memory_order_acquire))) return false;
  const uint64_t taken = loop_.fetch_add(1, std::memory_order_acq_rel);
  if (!left(taken)) return false;
  work_(user_, taken & kTasks);
  done_.fetch_add(1, std::memory_order_release);
  return true;
}

void Team::Help() {
  int looks = 0;
  while (!finished_.load(std::memory_order_acquire)) {
    if (TakeTask()) {
      looks = 0;
    } else {
      Pause(looks);
    }
  }
}

void Team::ForEach(size_t tasks, TaskOf work, void* user) {
  if (tasks <= 1 || members_.load(std::memory_order_relaxed) <= 1) {
    for (size_t task = 0; task < tasks; ++task) work(user, task);
    return;
  }
  for (size_t first = 0; first < tasks; first += kMostTasks) {
    struct Part {
      TaskOf work;
      void* user;
      size_t first;
    } part = {work, user, first};
    const size_t count = std::min(tasks - first, kMostTasks);
    work_ = [](void* of, size_t task) {
      const Part& own = *static_cast<const Part*>(of);
      own.work(own.user, own.first + task);
    };
    user_ = &part;
    done_.store(0, std::memory_order_relaxed);
    const uint64_t number = (loop_.load(std::memory_order_relaxed) >> 2 * kTaskBits) + 1;
    loop_.store(number << 2 * kTaskBits | count << kTaskBits, std::memory_order_release);
    while (TakeTask()) {
    }
    for (int looks = 0; done_.load(std::memory_order_acquire) < count;) Pause(looks);
  }
}

}  // namespace tda
