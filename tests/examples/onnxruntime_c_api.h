// Stands in for ONNX Runtime's own header, which no package ships, so that the C++ example compiles in tests: the names
// that the example uses, over the project's declaration of the ABI.
#pragma once

#include "ort_abi.h"

extern "C" const OrtApiBase* OrtGetApiBase();

constexpr uint32_t ORT_API_VERSION = tda::kOrtApiVersion;

enum OrtLoggingLevel { ORT_LOGGING_LEVEL_ERROR = 3 };
enum OrtAllocatorType { OrtArenaAllocator = 1 };
enum OrtMemType { OrtMemTypeDefault = 0 };
using ONNXTensorElementDataType = int;  // an enum in the original, which functions here take as int
constexpr ONNXTensorElementDataType ONNX_TENSOR_ELEMENT_DATA_TYPE_UNDEFINED = 0;
constexpr ONNXTensorElementDataType ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT = 1;
constexpr ONNXTensorElementDataType ONNX_TENSOR_ELEMENT_DATA_TYPE_INT32 = 6;
constexpr ONNXTensorElementDataType ONNX_TENSOR_ELEMENT_DATA_TYPE_INT64 = 7;
