// Threads that work through many short loops together.
//
// To hand each loop out to a thread pool takes longer than some of the loops themselves. So the pool is asked once: its
// threads become members of a team, of which the first to arrive leads. The leader runs code that has loops in it, and
// the others take tasks of the present loop until the leader has finished. No loop waits for members that have not come:
// whoever is there does the work.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <exception>

namespace tda {

class Team {
 public:
  static constexpr size_t kMostMembers = 255;  // more leave at once

  using TaskOf = void (*)(void* user, size_t task);

  // A member's part: lead() for the first, which the others help until it returns. lead() does not throw.
  template <class Lead>
  void Join(const Lead& lead) {
    const size_t member = members_.fetch_add(1, std::memory_order_relaxed);
    if (member > 0) return Help(member);
    lead();
    finished_.store(true, std::memory_order_release);
  }

  // Return how many have come, as far as the caller can know.
  size_t Members() const {
    const size_t members = members_.load(std::memory_order_relaxed);
    return members < kMostMembers ? members : kMostMembers;
  }

  // Called by the leader alone: work(user, task) for every task in [0, tasks), by all members. Throws what a task has
  // thrown, once all have ended.
  void ForEach(size_t tasks, TaskOf work, void* user);

 private:
  // Neighbouring tasks, which one member takes in order, as their memory often lies so; and others when they have none
  // left. In one word, so that whoever takes a task knows whether there was one: the next task, and the end.
  struct alignas(64) Share {
    std::atomic<uint64_t> tasks{0};
  };

  void Help(size_t member);
  void TakeTasks(size_t first_share, size_t shares);

  Share shares_[kMostMembers];
  // The number of the present loop, and into how many shares it is cut.
  alignas(64) std::atomic<uint64_t> loop_{0};
  // What it does. It is written before shares are, and not again before all tasks are done.
  TaskOf work_ = nullptr;
  void* user_ = nullptr;
  alignas(64) std::atomic<size_t> done_{0};  // tasks of the present loop
  std::atomic<bool> failed_{false};          // one of them has thrown
  std::exception_ptr failure_;               // the first to do so
  alignas(64) std::atomic<bool> finished_{false};
  std::atomic<size_t> members_{0};
};

}  // namespace tda
