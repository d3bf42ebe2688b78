// Loops of any size by teams of one to five members; test_team.py compiles it with sanitizers.
#include <cstdio>
#include <random>
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

}  // namespace

int main() {
  std::mt19937 random(1);
  for (int round = 0; round < 100; ++round) {
    if (RunTeam(random, 1 + round % 5)) continue;
    std::printf("round %d: another sum\n", round);
    return 1;
  }
  return 0;
}
