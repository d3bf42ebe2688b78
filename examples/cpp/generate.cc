// Greedy generation from token ids with a float32 artifact: ONNX Runtime's C API, on the CPU.
//
//   generate ARTIFACT [--dense] [--price P] [--library PATH] [--max-new-tokens N] [--eos ID] ID...
//
// The prefill graph reads the prompt; the decode graph reads of the weights what the prompt's mask says, or, of an
// artifact with prices, what is worth the price. Keys and values lie in one buffer per layer, which both graphs read and
// write in place; everything is bound once and nothing is copied between steps. What is fed and what comes back is
// described in docs/artifact-format.md. Text is left to a tokenizer library.
#include <onnxruntime_c_api.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <list>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

const OrtApi* api = nullptr;

void Check(OrtStatus* status) {
  if (status == nullptr) return;
  const std::string message = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(message);
}

std::vector<int64_t> Sizes(const OrtTensorTypeAndShapeInfo* info) {
  size_t count = 0;
  Check(api->GetDimensionsCount(info, &count));
  std::vector<int64_t> sizes(count);
  Check(api->GetDimensions(info, sizes.data(), count));
  return sizes;
}

std::vector<int64_t> Sizes(const OrtValue* value) {
  OrtTensorTypeAndShapeInfo* info = nullptr;
  Check(api->GetTensorTypeAndShape(value, &info));
  const std::vector<int64_t> sizes = Sizes(info);
  api->ReleaseTensorTypeAndShapeInfo(info);
  return sizes;
}

template <typename T>
constexpr ONNXTensorElementDataType kType = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;
template <>
constexpr ONNXTensorElementDataType kType<int32_t> = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32;
template <>
constexpr ONNXTensorElementDataType kType<int64_t> = ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64;

// A tensor in memory of ours; what is written to `data` is what the next run reads.
template <typename T>
struct Tensor {
  Tensor(const OrtMemoryInfo* memory, std::vector<int64_t> sizes, T fill = T{}) {
    int64_t count = 1;
    for (int64_t size : sizes) count *= size;
    data.assign(static_cast<size_t>(count), fill);
    Check(api->CreateTensorWithDataAsOrtValue(memory, data.data(), data.size() * sizeof(T), sizes.data(), sizes.size(),
                                              kType<T>, &value));
  }
  Tensor(const Tensor&) = delete;
  ~Tensor() { api->ReleaseValue(value); }

  std::vector<T> data;
  OrtValue* value = nullptr;
};

// One graph with its inputs and outputs bound.
struct Graph {
  Graph(const OrtEnv* env, const std::string& path, const std::string& library = "") {
    OrtSessionOptions* options = nullptr;
    Check(api->CreateSessionOptions(&options));
    void* handle = nullptr;  // of the library, which stays loaded
    if (!library.empty()) Check(api->RegisterCustomOpsLibrary(options, library.c_str(), &handle));
    Check(api->CreateSession(env, path.c_str(), options, &session));
    Check(api->CreateIoBinding(session, &binding));
  }
  void Feed(const std::string& name, const OrtValue* value) { Check(api->BindInput(binding, name.c_str(), value)); }
  void WriteTo(const std::string& name, const OrtValue* value) { Check(api->BindOutput(binding, name.c_str(), value)); }
  void Allocate(const std::string& name, const OrtMemoryInfo* memory) {
    Check(api->BindOutputToDevice(binding, name.c_str(), memory));
  }
  // Returns the outputs in the order in which they were bound.
  std::vector<OrtValue*> Run() {
    Check(api->RunWithBinding(session, nullptr, binding));
    OrtAllocator* allocator = nullptr;
    Check(api->GetAllocatorWithDefaultOptions(&allocator));
    OrtValue** values = nullptr;
    size_t count = 0;
    Check(api->GetBoundOutputValues(binding, allocator, &values, &count));
    std::vector<OrtValue*> outputs(values, values + count);
    allocator->Free(allocator, values);
    return outputs;
  }

  OrtSession* session = nullptr;
  OrtIoBinding* binding = nullptr;
};

// The likeliest token after the last position of logits [1, S, V].
int64_t Likeliest(OrtValue* logits) {
  void* data = nullptr;
  Check(api->GetTensorMutableData(logits, &data));
  const std::vector<int64_t> sizes = Sizes(logits);
  const float* last = static_cast<const float*>(data) + (sizes[1] - 1) * sizes[2];
  return std::max_element(last, last + sizes[2]) - last;
}

struct Arguments {
  std::string artifact, library;
  bool dense = false;
  std::optional<float> price;
  int64_t max_new_tokens = 64;
  std::vector<int64_t> prompt, eos;
};

Arguments Parse(int argc, char** argv) {
  Arguments given;
  for (int i = 1; i < argc; ++i) {
    const std::string word = argv[i];
    const auto value = [&] {
      if (++i == argc) throw std::invalid_argument(word + " needs a value");
      return std::string(argv[i]);
    };
    if (word == "--dense") given.dense = true;
    else if (word == "--price") given.price = std::stof(value());
    else if (word == "--library") given.library = value();
    else if (word == "--max-new-tokens") given.max_new_tokens = std::stoll(value());
    else if (word == "--eos") given.eos.push_back(std::stoll(value()));
    else if (given.artifact.empty()) given.artifact = word;
    else given.prompt.push_back(std::stoll(word));
  }
  if (given.prompt.empty()) throw std::invalid_argument("an artifact and token ids are needed");
  return given;
}

void Generate(const Arguments& given) {
  OrtEnv* env = nullptr;  // errors only: otherwise ONNX Runtime warns of every input that has a default
  Check(api->CreateEnv(ORT_LOGGING_LEVEL_ERROR, "generate", &env));
  OrtMemoryInfo* memory = nullptr;
  Check(api->CreateCpuMemoryInfo(OrtArenaAllocator, OrtMemTypeDefault, &memory));
  // On the CPU the library has kernels for float32 decode alone; a session that they do not serve would be refused.
  Graph prefill(env, given.artifact + "/prefill.onnx");
  Graph decode(env, given.artifact + "/decode.onnx", given.library);

  size_t inputs = 0;  // without those that have defaults: input_ids, attention_mask, keys and values
  Check(api->SessionGetInputCount(prefill.session, &inputs));
  const int layers = static_cast<int>(inputs - 2) / 2;
  OrtTypeInfo* type = nullptr;
  Check(api->SessionGetInputTypeInfo(prefill.session, 2, &type));
  const OrtTensorTypeAndShapeInfo* key = nullptr;
  Check(api->CastTypeInfoToTensorInfo(type, &key));
  std::vector<int64_t> cache_sizes = Sizes(key);  // [1, KV, past, D]
  ONNXTensorElementDataType stored = ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED;
  Check(api->GetTensorElementType(key, &stored));
  if (stored != ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT) {
    throw std::runtime_error("keys and values are not float32: build it with --dtype fp32 --kv float");
  }
  api->ReleaseTypeInfo(type);

  const int64_t length = static_cast<int64_t>(given.prompt.size()), capacity = length + given.max_new_tokens;
  cache_sizes[2] = capacity;
  Tensor<int64_t> prompt(memory, {1, length}), token(memory, {1, 1}), attended(memory, {1, capacity});
  std::copy(given.prompt.begin(), given.prompt.end(), prompt.data.begin());
  std::fill_n(attended.data.begin(), length, 1);
  std::list<Tensor<float>> cache;
  for (Graph* graph : {&prefill, &decode}) {
    auto buffer = cache.begin();
    graph->Feed("input_ids", graph == &prefill ? prompt.value : token.value);
    graph->Feed("attention_mask", attended.value);
    graph->Allocate("logits", memory);
    for (int i = 0; i < layers; ++i) {
      for (const char* part : {".key", ".value"}) {
        if (graph == &prefill) buffer = cache.emplace(cache.end(), memory, cache_sizes);
        const std::string name = std::to_string(i) + part;
        graph->Feed("past_key_values." + name, buffer->value);
        graph->WriteTo("present." + name, buffer->value);
        ++buffer;
      }
    }
  }
  size_t outputs_of_prefill = 0;  // logits, keys and values; where neurons have masks, more
  Check(api->SessionGetOutputCount(prefill.session, &outputs_of_prefill));
  const bool masks = outputs_of_prefill > 1 + 2 * static_cast<size_t>(layers) && !given.dense;
  Tensor<float> price(memory, {1}, given.price.value_or(0));
  if (given.price) decode.Feed("price", price.value);  // by default the one that was built

  for (int i = 0; i < layers && masks; ++i) {
    prefill.Allocate("present_mask_indices." + std::to_string(i), memory);
    prefill.Allocate("present_tail_mean." + std::to_string(i), memory);
  }

  std::vector<OrtValue*> outputs = prefill.Run();
  // The mask belongs to the prompt and stays bound. Dense decoding reads one token after another with prefill instead.
  Tensor<int32_t> nothing(memory, {1}, -1);  // an empty mask is written as one padding index
  for (int i = 0; i < layers && masks; ++i) {
    OrtValue* const* chosen = &outputs[outputs.size() - 2 * static_cast<size_t>(layers - i)];
    decode.Feed("mask_indices." + std::to_string(i), Sizes(chosen[0])[0] ? chosen[0] : nothing.value);
    decode.Feed("tail_mean." + std::to_string(i), chosen[1]);
  }
  Graph& step = given.dense ? prefill : decode;
  step.Feed("input_ids", token.value);
  for (int64_t count = 0; count < given.max_new_tokens; ++count) {
    if (count) {
      attended.data[static_cast<size_t>(length + count - 1)] = 1;
      outputs = step.Run();
    }
    token.data[0] = Likeliest(outputs[0]);
    if (std::find(given.eos.begin(), given.eos.end(), token.data[0]) != given.eos.end()) break;
    std::cout << token.data[0] << ' ' << std::flush;
  }
  std::cout << std::endl;
}

}  // namespace

int main(int argc, char** argv) {
  try {
    api = OrtGetApiBase()->GetApi(ORT_API_VERSION);
    if (api == nullptr) throw std::runtime_error("this ONNX Runtime is older than the header");
    Generate(Parse(argc, argv));
  } catch (const std::invalid_argument&) {  // std::stoll's as well
    std::cerr << "Usage: generate ARTIFACT [--dense] [--price P] [--library PATH] [--max-new-tokens N] [--eos ID] ID..."
              << std::endl;
    return 2;
  } catch (const std::exception& error) {
    std::cerr << "generate: " << error.what() << std::endl;
    return 1;
  }
}
