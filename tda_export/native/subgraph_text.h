// How tda::Subgraph is told what there is inside: its attribute `nodes` (docs/artifact-format.md).
#pragma once

#include <map>
#include <string>
#include <vector>

namespace tda {

// Where a tensor of a node is.
struct Place {
  enum Kind { kAbsent, kInput, kOutput, kInner } kind = kAbsent;
  size_t index = 0;
};

// One line of the attribute. Throws where it is none.
struct NodeText {
  explicit NodeText(const std::string& line);

  std::string name;
  std::vector<Place> inputs, outputs;
  std::map<std::string, std::string> attributes;
};

}  // namespace tda
