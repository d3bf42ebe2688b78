#include "subgraph_text.h"

#include <cstdlib>
#include <sstream>

#include "ort.h"

namespace tda {
namespace {

Place ReadPlace(const std::string& text) {
  if (text == "-") return {};
  constexpr char kKinds[] = "-iov";
  const char* kind = text.empty() ? nullptr : std::char_traits<char>::find(kKinds, sizeof kKinds - 1, text[0]);
  char* end = nullptr;
  const unsigned long index = text.size() > 1 ? std::strtoul(text.c_str() + 1, &end, 10) : 0;
  constexpr unsigned long kMostTensors = 1 << 20;
  if (kind == nullptr || end == nullptr || *end != '\0' || index > kMostTensors) {
    Fail("nodes: there is no tensor '", text, "'");
  }
  return {static_cast<Place::Kind>(kind - kKinds), index};
}

std::vector<Place> ReadPlaces(const std::string& text) {
  std::vector<Place> places;
  std::istringstream parts(text);
  for (std::string part; std::getline(parts, part, ',');) places.push_back(ReadPlace(part));
  return places;
}

}  // namespace

NodeText::NodeText(const std::string& line) {
  std::istringstream words(line);
  std::string input_places, output_places, word;
  if (!(words >> name >> input_places >> output_places)) Fail("nodes: '", line, "' is no operator with inputs and outputs");
  inputs = ReadPlaces(input_places);
  outputs = ReadPlaces(output_places);
  while (words >> word) {
    const size_t equals = word.find('=');
    if (equals == std::string::npos) Fail("nodes: '", word, "' is no attribute with a value");
    attributes[word.substr(0, equals)] = word.substr(equals + 1);
  }
}

}  // namespace tda
