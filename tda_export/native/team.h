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

namespace tda {

class Team {
 public:
  using TaskOf = void (*)(void* user, size_t task);

  // A member's part: lead() for the first, which the others help until it returns. lead() does not throw.
  template <class Lead>
  void Join(const Lead& lead) {
    if (members_.fetch_add(1, std::memory_order_relaxed) > 0) return Help();
    lead();
    finished_.store(true, std::memory_order_release);
  }

  // Called by the leader alone: work(user, task) for every task in [0, tasks), in any order, by all members.
  void ForEach(size_t tasks, TaskOf work, void* user);

 private:
  void Help();
  bool TakeTask();

  // The present loop: its number, how many tasks it has, and the next one to take. In one word, so that whoever takes a
  // task takes one of the loop that it has read.
  static constexpr int kTaskBits = 20;
  static constexpr uint64_t kTasks = (uint64_t{1} << kTaskBits) - 1;
  static constexpr size_t kMostTasks = kTasks / 2;  // members count beyond the last task, once each

  alignas(64) std::atomic<uint64_t> loop_{0};
  // What it does. It is written before loop_, and not again before all of the loop's tasks are done.
  TaskOf work_ = nullptr;
  void* user_ = nullptr;
  alignas(64) std::atomic<size_t> done_{0};  // tasks of the present loop
  alignas(64) std::atomic<bool> finished_{false};
  std::atomic<int> members_{0};
};

}  // namespace tda
