#include "cuda_driver.h"

#include "dynamic_library.h"

namespace tda {
namespace {

const DynamicLibrary& DriverLibrary() {
  static const DynamicLibrary library({"libcuda.so.1"});
  return library;
}

}  // namespace

CudaDriver::CudaDriver() {
  const DynamicLibrary& library = DriverLibrary();
  if (!library.loaded()) Fail("the NVIDIA driver cannot be opened (", library.problem(), ")");
  const char* missing = nullptr;
  auto find = [&](const char* symbol, auto*& function) {
    library.Find(symbol, function);
    if (function == nullptr && missing == nullptr) missing = symbol;
  };
  find("cuInit", Init);
  find("cuGetErrorString", GetErrorString);
  find("cuDriverGetVersion", DriverGetVersion);
  find("cuCtxGetDevice", CtxGetDevice);
  find("cuDeviceGetAttribute", DeviceGetAttribute);
  find("cuLibraryLoadData", LibraryLoadData);
  find("cuLibraryGetKernel", LibraryGetKernel);
  find("cuKernelGetFunction", KernelGetFunction);
  find("cuOccupancyMaxActiveBlocksPerMultiprocessor", OccupancyMaxActiveBlocksPerMultiprocessor);
  find("cuOccupancyMaxActiveClusters", OccupancyMaxActiveClusters);
  find("cuFuncSetAttribute", FuncSetAttribute);
  find("cuLaunchKernelEx", LaunchKernelEx);
  find("cuMemcpy", Memcpy);
  if (missing != nullptr) Fail("the NVIDIA driver has no ", missing, "; update it to one for CUDA 12 or newer");
  Check(Init(0), "start the driver");
}

const CudaDriver& CudaDriver::Get() {
  static const CudaDriver driver;
  return driver;
}

void CudaDriver::Check(CuResult result, const char* what) const {
  if (result == 0) return;
  const char* text = nullptr;
  if (GetErrorString(result, &text) != 0 || text == nullptr) text = "unknown error";
  Fail("CUDA could not ", what, " (", text, ", error ", result, ")");
}

CudaDevice CudaDevice::Current() {
  const CudaDriver& driver = CudaDriver::Get();
  CudaDevice current{};
  int major = 0, minor = 0;
  driver.Check(driver.CtxGetDevice(&current.device), "find the current device");
  driver.Check(driver.DeviceGetAttribute(&major, kComputeCapabilityMajor, current.device), "read the device");
  driver.Check(driver.DeviceGetAttribute(&minor, kComputeCapabilityMinor, current.device), "read the device");
  driver.Check(driver.DeviceGetAttribute(&current.shared_bytes, kMostSharedBytesOfBlock, current.device),
               "read the shared memory of a block");
  driver.Check(driver.DeviceGetAttribute(&current.multiprocessors, kMultiprocessorCount, current.device),
               "read the device");
  current.capability = 10 * major + minor;
  return current;
}

}  // namespace tda
