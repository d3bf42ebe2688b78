#include "team.h"

#include <algorithm>
#include <utility>

#include <sched.h>

namespace tda {
namespace {

constexpr int kWordBits = 32;
constexpr uint64_t kWord = (uint64_t{1} << kWordBits) - 1;
constexpr size_t kMostTasks = kWord / 2;  // members count beyond the last task of a share, once each
constexpr size_t kTasksOfShare = 2;       // at least, where there is more than one
constexpr int kShareBits = 8;             // of the number of shares
constexpr int kPatience = 4096;           // looks, before the processor is offered to other threads
static_assert(Team::kMostMembers < size_t{1} << kShareBits);
// Members beyond so many look for a loop less often: the short loops of a step have no tasks for them, and whoever looks
// keeps the leader from writing.
constexpr size_t kEager = 32;
constexpr int kRarely = 32;

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

// Do tasks of the present loop until there are none left: those of a share, then those of the others.
void Team::TakeTasks(size_t first_share, size_t shares) {
  const auto left = [](uint64_t tasks) { return (tasks & kWord) < tasks >> kWordBits; };
  for (size_t i = 0; i < shares; ++i) {
    std::atomic<uint64_t>& tasks = shares_[(first_share + i) % shares].tasks;
    while (left(tasks.load(std::memory_order_acquire))) {
      const uint64_t taken = tasks.fetch_add(1, std::memory_order_acq_rel);
      if (!left(taken)) break;
      try {
        work_(user_, taken & kWord);
      } catch (...) {
        if (!failed_.exchange(true, std::memory_order_relaxed)) failure_ = std::current_exception();
      }
      done_.fetch_add(1, std::memory_order_release);
    }
  }
}

void Team::Help(size_t member) {
  if (member >= kMostMembers) return;
  uint64_t seen = 0;
  for (int looks = 0; !finished_.load(std::memory_order_acquire);) {
    const uint64_t loop = loop_.load(std::memory_order_acquire);
    if (loop == seen) {
      for (int i = 0; i < (member < kEager ? 1 : kRarely); ++i) Pause(looks);
      continue;
    }
    const size_t shares = loop & ((1 << kShareBits) - 1);
    TakeTasks(member % shares, shares);
    seen = loop;
    looks = 0;
  }
}

void Team::ForEach(size_t tasks, TaskOf work, void* user) {
  if (tasks <= 1 || tasks > kMostTasks) {
    for (size_t task = 0; task < tasks; ++task) work(user, task);
    return;
  }
  const size_t members = Members();
  const size_t shares = tasks >= kTasksOfShare * members ? members : 1;
  work_ = work;
  user_ = user;
  done_.store(0, std::memory_order_relaxed);
  for (size_t share = 0; share < shares; ++share) {
    const uint64_t begin = share * tasks / shares, end = (share + 1) * tasks / shares;
    shares_[share].tasks.store(end << kWordBits | begin, std::memory_order_release);
  }
  const uint64_t number = (loop_.load(std::memory_order_relaxed) >> kShareBits) + 1;
  loop_.store(number << kShareBits | shares, std::memory_order_release);
  TakeTasks(0, shares);
  for (int looks = 0; done_.load(std::memory_order_acquire) < tasks;) Pause(looks);
  if (failed_.load(std::memory_order_relaxed)) {
    failed_.store(false, std::memory_order_relaxed);
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
}

}  // namespace tda
