// Loops of any size by teams of one to five members; test_team.py compiles it with sanitizers.
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <random>
#include <stdexcept>
#include <thread>
#include <vector>

#include "team.h"

namespace {

struct Loop {
  std::vector<long>& cells;  // a task adds the loop's number to its own
  long number;
};

bool RunTeam(std::mt19937& random, int members) {
  constexpr size_t kFew = 40, kMany = 3000;
  std::vector<long> cells(kMany);
  tda::Team team;
  long expected = 0;
  const auto lead = [&] {
    for (long number = 0; number < 200; ++number) {
      const size_t tasks = number % 50 == 7 ? kMany : random() % kFew;
      Loop loop = {cells, number};
      const auto add = [](void* of, size_t task) {
        const Loop& own = *static_cast<const Loop*>(of);
        own.cells[task] += own.number;
      };
      team.ForEach(tasks, add, &loop);
      expected += static_cast<long>(tasks) * number;
    }
  };
  std::vector<std::thread> threads;
  for (int member = 0; member < members; ++member) threads.emplace_back([&] { team.Join(lead); });
  for (std::thread& thread : threads) thread.join();
  long found = 0;
  for (const long cell : cells) found += cell;
  return found == expected;
}

// A task that throws: ForEach throws it once all tasks have ended, and the next loop works.
bool PassesErrorsOn(int members) {
  constexpr size_t kTasks = 50;
  tda::Team team;
  bool right = true;
  const auto lead = [&] {
    for (size_t bad = 0; bad < kTasks; ++bad) {
      std::vector<int> ended(kTasks);
      struct Loop {
        std::vector<int>& ended;
        size_t bad;
      } loop = {ended, bad};
      const auto work = [](void* of, size_t task) {
        const Loop& own = *static_cast<const Loop*>(of);
        own.ended[task] = 1;
        if (task == own.bad) throw std::runtime_error("a task");
      };
      bool thrown = false;
      try {
        team.ForEach(kTasks, work, &loop);
      } catch (const std::runtime_error&) {
        thrown = true;
      }
      // Alone, a leader goes on to the end as well.
      right = right && thrown && std::count(ended.begin(), ended.end(), 1) == static_cast<long>(kTasks);
    }
  };
  std::vector<std::thread> threads;
  for (int member = 0; member < members; ++member) threads.emplace_back([&] { team.Join(lead); });
  for (std::thread& thread : threads) thread.join();
  return right;
}

// A member that comes while the first loop runs takes tasks of it.
bool LateMembersHelp() {
  constexpr size_t kTasks = 40;
  tda::Team team;
  std::vector<std::thread::id> by(kTasks);
  const auto lead = [&] {
    const auto work = [](void* of, size_t task) {
      (*static_cast<std::vector<std::thread::id>*>(of))[task] = std::this_thread::get_id();
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    };
    team.ForEach(kTasks, work, &by);
  };
  std::thread leader([&] { team.Join(lead); });
  std::this_thread::sleep_for(std::chrono::milliseconds(20));
  std::thread late([&] { team.Join(lead); });
  leader.join();
  late.join();
  return std::count(by.begin(), by.end(), by[0]) < static_cast<long>(kTasks);
}

}  // namespace

int main() {
  std::mt19937 random(1);
  for (const int members : {1, 2, 5}) {
    if (PassesErrorsOn(members)) continue;
    std::printf("%d members: an error is lost\n", members);
    return 1;
  }
  if (!LateMembersHelp()) {
    std::puts("who comes late does nothing");
    return 1;
  }
  for (int round = 0; round < 100; ++round) {
    // Now and then more than a team takes.
    if (RunTeam(random, round == 50 ? 300 : 1 + round % 5)) continue;
    std::printf("round %d: another sum\n", round);
    return 1;
  }
  return 0;
}
