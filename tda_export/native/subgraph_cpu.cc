// tda::Subgraph on the CPU: nodes of this library, one after another, as one node of ONNX Runtime's.
//
// Between two nodes ONNX Runtime spends microseconds, and for the loops of each it wakes its threads anew. A step of a
// small model has some hundred and fifty nodes and lasts a few milliseconds. Here the threads form a team for all nodes
// (team.h), and nothing is asked of ONNX Runtime between them. Kernels are those of the nodes, so no bit changes.
#include "subgraph_cpu.h"

#include <algorithm>
#include <cstdlib>
#include <deque>
#include <exception>
#include <locale>
#include <mutex>
#include <sstream>
#include <thread>

#include <sys/mman.h>
#include <unistd.h>

#include "subgraph_text.h"
#include "team.h"

namespace tda {
namespace {

constexpr size_t kAlignment = 64;
constexpr size_t kMuch = 64 << 10;     // bytes; more are asked of the system
constexpr size_t kMostKept = 4 << 20;  // bytes of a room that are kept for the next call

size_t BytesOf(const Tensor& tensor) {
  const auto element = [](int type) -> size_t {
    switch (type) {
      case kFloat:
      case kInt32: return 4;
      case kInt64: return 8;
      case kHalf: return 2;
      case kInt8:
      case kUint8: return 1;
      default: Fail("nodes: no tensor between them has element type ", type);
    }
  };
  return element(tensor.type) * tensor.Count();
}

// What a node's kernel is made from.
class InnerInfo : public KernelInfo {
 public:
  InnerInfo(const KernelInfo& outer, const NodeText& node)
      : KernelInfo(outer.api(), outer.get()), outer_(outer), node_(node) {}

  int64_t Int(const char* attribute) const override { return Number<int64_t>(attribute); }
  bool Flag(const char* attribute) const override { return node_.attributes.count(attribute) && Int(attribute) != 0; }
  float Float(const char* attribute) const override { return Number<float>(attribute); }
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

  // Read a number in the same way in every locale.
  template <class T>
  T Number(const char* attribute) const {
    const std::string& text = Text(attribute);
    std::istringstream stream(text);
    stream.imbue(std::locale::classic());
    T number;
    if (!(stream >> number) || stream.peek() != std::char_traits<char>::eof()) {
      Fail("attribute '", attribute, "': '", text, "' is no number");
    }
    return number;
  }

  const KernelInfo& outer_;
  const NodeText& node_;
};

struct Node {
  // Throw unless an input is there, with the type that the kernel takes. ONNX Runtime does not know it.
  void Check(size_t input, const Tensor& tensor) const {
    const int expected = definition->inputs[input].type;
    if (!tensor.present) Fail("input ", input, " is missing");
    if (tensor.type != expected) {
      Fail("input ", input, ": expected element type ", expected, ", got ", tensor.type);
    }
  }

  const OpDefinition* definition;
  std::unique_ptr<Kernel> kernel;
  std::vector<Place> inputs, outputs;
  std::vector<Tensor> constants;  // by input
};

// Memory of a tensor that only nodes inside know, or of a node's own; of several, one after another. Much memory is asked
// of the system: what comes and goes with calls of many tokens would leave holes in the heap, by which a process grows for
// hours.
class Room {
 public:
  Room() = default;
  Room(const Room&) = delete;
  Room& operator=(const Room&) = delete;
  ~Room() { Release(); }

  void* For(size_t bytes) {
    if (bytes > size_) {
      Release();
      const bool much = bytes > kMuch;
      const size_t unit = much ? sysconf(_SC_PAGESIZE) : kAlignment, whole = (bytes + unit - 1) / unit * unit;
      void* memory = much ? mmap(nullptr, whole, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
                          : std::aligned_alloc(kAlignment, whole);
      if (memory == nullptr || memory == MAP_FAILED) Fail("no memory for ", bytes, " bytes between nodes");
      memory_ = memory;
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
    if (size_ > kMuch) {
      munmap(memory_, size_);
    } else {
      std::free(memory_);
    }
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
  std::deque<Room> scratch;  // of the node that runs

  void Trim() {
    for (Room& room : rooms) room.Trim();
    for (Room& room : scratch) room.Trim();
  }
};

// A call of a node inside.
class InnerContext : public KernelContext {
 public:
  InnerContext(const KernelContext& outer, const Node& node, const std::vector<size_t>& rooms, Frame& frame, Team& team)
      : KernelContext(outer.api(), outer.get(), node.constants), outer_(outer), node_(node), rooms_(rooms), frame_(frame),
        team_(team) {}

  Tensor Input(size_t index) const override {
    if (index >= node_.inputs.size() || node_.inputs[index].kind == Place::kAbsent) return {};
    if (node_.constants[index].present) return node_.constants[index];
    const Tensor& tensor = Find(node_.inputs[index]);
    node_.Check(index, tensor);
    return tensor;
  }

  int64_t Threads() const override { return team_.Members(); }
  void* OwnMemory(size_t bytes) const override {
    if (scratch_ == frame_.scratch.size()) frame_.scratch.emplace_back();
    return frame_.scratch[scratch_++].For(bytes);
  }

 protected:
  Tensor Allocate(size_t index, const int64_t* sizes, size_t rank) const override {
    Tensor tensor;
    tensor.present = true;
    tensor.type = node_.definition->outputs[index].type;
    tensor.rank = rank;
    std::copy(sizes, sizes + rank, tensor.sizes);
    const Place& place = node_.outputs[index];
    if (place.kind == Place::kOutput) {
      tensor.data = outer_.OutputLike(place.index, tensor).data;
      return frame_.outputs[place.index] = tensor;
    }
    tensor.data = frame_.rooms[rooms_[place.index]].For(BytesOf(tensor));
    return frame_.inner[place.index] = tensor;
  }

  void Distribute(size_t tasks, TaskOf work, void* user) const override { team_.ForEach(tasks, work, user); }

 private:
  const Tensor& Find(const Place& place) const {
    if (place.kind == Place::kOutput) return frame_.outputs[place.index];
    if (place.kind == Place::kInner) return frame_.inner[place.index];
    Tensor& input = frame_.inputs[place.index];
    if (!input.present) input = outer_.Input(place.index);
    return input;
  }

  const KernelContext& outer_;
  const Node& node_;
  const std::vector<size_t>& rooms_;
  Frame& frame_;
  Team& team_;
  mutable size_t scratch_ = 0;  // rooms that the node has
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
    frame->Trim();
    const std::lock_guard<std::mutex> lock(mutex_);
    free_frames_.push_back(std::move(frame));
  }

 private:
  void AddNode(const KernelInfo& info, NodeText text) {
    const OpDefinition* definition = OperatorOnCpu(text.name);
    if (definition == nullptr) Fail("nodes: there is no kernel ", text.name, " on the CPU");
    CheckPlaces(*definition, text);
    Node node = {definition};
    const InnerInfo own(info, text);
    try {
      for (size_t i = 0; i < text.inputs.size(); ++i) {
        node.constants.push_back(own.Constant(i));
        if (text.inputs[i].kind != Place::kInput) continue;
        inputs_ = std::max(inputs_, text.inputs[i].index + 1);
        if (node.constants.back().present) {
          node.Check(i, node.constants.back());
        } else {
          varying_.push_back(text.inputs[i].index);
        }
      }
      node.kernel = definition->create(own);
    } catch (const Error& error) {
      Fail(text.name, ": ", error.what());
    }
    for (const Place& place : text.outputs) {
      std::vector<bool>& made = place.kind == Place::kOutput ? made_outputs_ : made_inner_;
      if (made.size() <= place.index) made.resize(place.index + 1);
      if (made[place.index]) Fail("nodes: ", text.name, " gives what a node before it gives");
      made[place.index] = true;
    }
    node.inputs = std::move(text.inputs);
    node.outputs = std::move(text.outputs);
    nodes_.push_back(std::move(node));
  }

  // Throw unless a node has the inputs and outputs of its operator, and its inputs exist before it.
  void CheckPlaces(const OpDefinition& definition, const NodeText& text) const {
    if (text.outputs.size() != definition.outputs.size()) {
      Fail("nodes: ", text.name, ": outputs: expected ", definition.outputs.size(), ", got ", text.outputs.size());
    }
    if (text.inputs.size() > definition.inputs.size()) {
      Fail("nodes: ", text.name, ": inputs: expected at most ", definition.inputs.size(), ", got ", text.inputs.size());
    }
    for (size_t i = 0; i < definition.inputs.size(); ++i) {
      const bool given = i < text.inputs.size() && text.inputs[i].kind != Place::kAbsent;
      if (!given && !definition.inputs[i].optional) Fail("nodes: ", text.name, ": input ", i, " is missing");
    }
    for (const Place& place : text.inputs) {
      if (place.kind == Place::kOutput || place.kind == Place::kInner) CheckMade(place, text.name);
    }
    for (const Place& place : text.outputs) {
      if (place.kind == Place::kInput || place.kind == Place::kAbsent) {
        Fail("nodes: ", text.name, " cannot give what is an input, or nothing");
      }
    }
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
    } catch (const std::exception& error) {
      Fail(node.definition->name, ": ", error.what());
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
