// tda::Subgraph on the CPU: nodes of this library, one after another, as one node of ONNX Runtime's.
//
// Between two nodes ONNX Runtime spends microseconds, and for the loops of each it wakes its threads anew. A step of a
// small model has some hundred and fifty nodes and lasts a few milliseconds. Here the threads form a team for all nodes
// (team.h), and nothing is asked of ONNX Runtime between them. Kernels are those of the nodes, so no bit changes.
//
// The attribute `nodes` says what there is, a line for each node, in an order in which they can run:
//
//   operator input,.. output,.. name=value ..
//
// A tensor is the subgraph's input i3 or output o0, or v7, which only nodes inside know; an input that is left out is -.
#include "subgraph_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <exception>
#include <map>
#include <mutex>
#include <sstream>
#include <thread>

#include "team.h"

namespace tda {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMostKept = 4 << 20;  // bytes of a tensor that are kept for the next call
constexpr size_t kElementBytes[] = {0, 4, 1, 1, 2, 2, 4, 8, 0, 1, 2};  // by ONNX's element types, up to float16

size_t BytesOf(const Tensor& tensor) {
  const size_t types = sizeof kElementBytes / sizeof *kElementBytes;
  const size_t bytes = static_cast<size_t>(tensor.type) < types ? kElementBytes[tensor.type] : 0;
  if (bytes == 0) Fail("an element type that is not expected inside, ", tensor.type);
  return bytes * tensor.Count();
}

// Where a tensor of a node is.
struct Place {
  enum Kind { kAbsent, kInput, kOutput, kInner } kind = kAbsent;
  size_t index = 0;
};

// One line of the attribute.
struct NodeText {
  explicit NodeText(const std::string& line);

  std::string name;
  std::vector<Place> inputs, outputs;
  std::map<std::string, std::string> attributes;
};

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

// What a node's kernel is made from.
class InnerInfo : public KernelInfo {
 public:
  InnerInfo(const KernelInfo& outer, const NodeText& node)
      : KernelInfo(outer.api(), outer.get()), outer_(outer), node_(node) {}

  int64_t Int(const char* attribute) const override { return std::strtoll(Text(attribute).c_str(), nullptr, 10); }
  bool Flag(const char* attribute) const override { return node_.attributes.count(attribute) && Int(attribute) != 0; }
  float Float(const char* attribute) const override { return std::strtof(Text(attribute).c_str(), nullptr); }
  std::string String(const char* attribute) const override { return Text(attribute); }
  Tensor Constant(size_t input) const override {
    const bool given = input < node_.inputs.size() && node_.inputs[input].kind == Place::kInput;
    return given ? outer_.Constant(node_.inputs[input].index) : Tensor();
  }

 private:
  const std::string& Text(const char* attribute) const {
    const auto found = node_.attributes.find(attribute);
    if (found == node_.attributes.end()) Fail(node_.name, " has no attribute '", attribute, "'");
    return found->second;
  }

  const KernelInfo& outer_;
  const NodeText& node_;
};

struct Node {
  std::string name;
  std::unique_ptr<Kernel> kernel;
  std::vector<Place> inputs, outputs;
  std::vector<int> output_types;
  std::vector<Tensor> constants;  // by input
};

// Memory of a tensor that only nodes inside know; of several, one after another.
class Room {
 public:
  ~Room() { std::free(memory_); }

  void* For(size_t bytes) {
    if (bytes > size_) {
      Release();
      const size_t whole = (bytes + kAlignment - 1) / kAlignment * kAlignment;
      memory_ = std::aligned_alloc(kAlignment, whole);
      if (memory_ == nullptr) Fail("no memory for ", bytes, " bytes between nodes");
      size_ = whole;
    }
    return memory_;
  }

  // Give much memory back, which only calls of many tokens need.
  void Trim() {
    if (size_ > kMostKept) Release();
  }

 private:
  void Release() {
    std::free(memory_);
    memory_ = nullptr;
    size_ = 0;
  }

  void* memory_ = nullptr;
  size_t size_ = 0;
};

// The tensors of one call.
struct Frame {
  std::vector<Tensor> inputs, outputs, inner;
  std::vector<Room> rooms;
};

// A call of a node inside.
class InnerContext : public KernelContext {
 public:
  InnerContext(const KernelContext& outer, const Node& node, const std::vector<size_t>& rooms, Frame& frame, Team& team)
      : KernelContext(outer.api(), outer.get(), node.constants), outer_(outer), node_(node), rooms_(rooms), frame_(frame),
        team_(team) {}

  Tensor Input(size_t index) const override {
    if (index >= node_.inputs.size()) return {};
    if (node_.constants[index].present) return node_.constants[index];
    const Place& place = node_.inputs[index];
    switch (place.kind) {
      case Place::kInput: {
        Tensor& input = frame_.inputs[place.index];
        if (!input.present) input = outer_.Input(place.index);
        return input;
      }
      case Place::kOutput: return frame_.outputs[place.index];
      case Place::kInner: return frame_.inner[place.index];
      case Place::kAbsent: break;
    }
    return {};
  }

 protected:
  Tensor Allocate(size_t index, const int64_t* sizes, size_t rank) const override {
    Tensor tensor;
    tensor.present = true;
    tensor.type = node_.output_types[index];
    tensor.rank = rank;
    std::copy(sizes, sizes + rank, tensor.sizes);
    const Place& place = node_.outputs[index];
    if (place.kind == Place::kOutput) return frame_.outputs[place.index] = outer_.OutputLike(place.index, tensor);
    tensor.data = frame_.rooms[rooms_[place.index]].For(BytesOf(tensor));
    return frame_.inner[place.index] = tensor;
  }

  void Distribute(size_t tasks, TaskOf work, void* user) const override { team_.ForEach(tasks, work, user); }

 private:
  const KernelContext& outer_;
  const Node& node_;
  const std::vector<size_t>& rooms_;
  Frame& frame_;
  Team& team_;
};

class Subgraph : public Kernel {
 public:
  explicit Subgraph(const KernelInfo& info) {
    std::istringstream lines(info.String("nodes"));
    for (std::string line; std::getline(lines, line);) AddNode(info, NodeText(line));
    ShareRooms();
  }

  void Compute(const KernelContext& context) override {
    std::unique_ptr<Frame> frame = TakeFrame();
    Team team;
    std::exception_ptr failure;
    const auto lead = [&] {
      try {
        for (const Node& node : nodes_) Run(context, node, *frame, team);
      } catch (...) {
        failure = std::current_exception();
      }
    };
    static const size_t members = std::clamp<size_t>(std::thread::hardware_concurrency(), 2, Team::kMostMembers);
    context.ParallelFor(members, [&](size_t) { team.Join(lead); });
    if (failure) std::rethrow_exception(failure);
    for (Room& room : frame->rooms) room.Trim();
    const std::lock_guard<std::mutex> lock(mutex_);
    free_frames_.push_back(std::move(frame));
  }

 private:
  void AddNode(const KernelInfo& info, NodeText text) {
    const OpDefinition* definition = OperatorOnCpu(text.name);
    if (definition == nullptr) Fail("nodes: there is no kernel ", text.name, " on the CPU");
    if (text.outputs.size() != definition->outputs.size()) {
      Fail("nodes: ", text.name, ": outputs: expected ", definition->outputs.size(), ", got ", text.outputs.size());
    }
    if (text.inputs.size() > definition->inputs.size()) {
      Fail("nodes: ", text.name, ": inputs: expected at most ", definition->inputs.size(), ", got ", text.inputs.size());
    }
    for (const Place& place : text.inputs) {
      if (place.kind == Place::kOutput || place.kind == Place::kInner) CheckMade(place, text.name);
    }
    Node node;
    const InnerInfo own(info, text);
    for (size_t i = 0; i < text.inputs.size(); ++i) {
      node.constants.push_back(own.Constant(i));
      if (text.inputs[i].kind != Place::kInput) continue;
      inputs_ = std::max(inputs_, text.inputs[i].index + 1);
      if (!node.constants.back().present) varying_.push_back(text.inputs[i].index);
    }
    try {
      node.kernel = definition->create(own);
    } catch (const Error& error) {
      Fail(text.name, ": ", error.what());
    }
    for (size_t i = 0; i < text.outputs.size(); ++i) {
      node.output_types.push_back(definition->outputs[i].type);
      std::vector<bool>& made = text.outputs[i].kind == Place::kOutput ? made_outputs_ : made_inner_;
      if (text.outputs[i].kind == Place::kInput || text.outputs[i].kind == Place::kAbsent) {
        Fail("nodes: ", text.name, " cannot give what is an input, or nothing");
      }
      if (made.size() <= text.outputs[i].index) made.resize(text.outputs[i].index + 1);
      made[text.outputs[i].index] = true;
    }
    node.name = std::move(text.name);
    node.inputs = std::move(text.inputs);
    node.outputs = std::move(text.outputs);
    nodes_.push_back(std::move(node));
  }

  void CheckMade(const Place& place, const std::string& reader) const {
    const std::vector<bool>& made = place.kind == Place::kOutput ? made_outputs_ : made_inner_;
    if (place.index >= made.size() || !made[place.index]) Fail("nodes: ", reader, " reads what no node before it gives");
  }

  // Give tensors inside rooms: one whose last reader has run leaves its room to later ones.
  void ShareRooms() {
    rooms_.resize(made_inner_.size());
    std::vector<size_t> last(made_inner_.size(), 0), free;  // the last node that reads or makes a tensor
    for (size_t n = 0; n < nodes_.size(); ++n) {
      for (const auto* places : {&nodes_[n].inputs, &nodes_[n].outputs}) {
        for (const Place& place : *places) {
          if (place.kind == Place::kInner) last[place.index] = n;
        }
      }
    }
    for (size_t n = 0; n < nodes_.size(); ++n) {
      for (const Place& place : nodes_[n].outputs) {
        if (place.kind != Place::kInner) continue;
        if (free.empty()) free.push_back(room_count_++);
        rooms_[place.index] = free.back();
        free.pop_back();
      }
      std::vector<size_t> ended;
      for (const auto* places : {&nodes_[n].inputs, &nodes_[n].outputs}) {
        for (const Place& place : *places) {
          if (place.kind == Place::kInner && last[place.index] == n) ended.push_back(rooms_[place.index]);
        }
      }
      std::sort(ended.begin(), ended.end());  // a node may read a tensor twice
      ended.erase(std::unique(ended.begin(), ended.end()), ended.end());
      free.insert(free.end(), ended.begin(), ended.end());
    }
  }

  void Run(const KernelContext& context, const Node& node, Frame& frame, Team& team) const {
    try {
      node.kernel->Compute(InnerContext(context, node, rooms_, frame, team));
    } catch (const Error& error) {
      Fail(node.name, ": ", error.what());
    }
  }

  std::unique_ptr<Frame> TakeFrame() {
    std::unique_ptr<Frame> frame;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (!free_frames_.empty()) {
        frame = std::move(free_frames_.back());
        free_frames_.pop_back();
      }
    }
    if (frame == nullptr) {
      frame = std::make_unique<Frame>();
      frame->inner.resize(rooms_.size());
      frame->outputs.resize(made_outputs_.size());
      frame->inputs.resize(inputs_);
      frame->rooms = std::vector<Room>(room_count_);
    }
    for (const size_t input : varying_) frame->inputs[input].present = false;
    return frame;
  }

  std::vector<Node> nodes_;
  std::vector<bool> made_outputs_, made_inner_;  // which of them a node gives
  std::vector<size_t> rooms_;                    // of each inner tensor
  size_t room_count_ = 0, inputs_ = 0;
  std::vector<size_t> varying_;  // inputs that are no constants
  std::mutex mutex_;
  std::vector<std::unique_ptr<Frame>> free_frames_;
};

}  // namespace

OpDefinition SubgraphOnCpu() {
  const IoType any = {kAnyType, false, false, true};
  return OpDefinition("Subgraph", nullptr, {any}, {any}, Create<Subgraph>);
}

}  // namespace tda
