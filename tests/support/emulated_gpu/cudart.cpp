// A CUDA runtime without a GPU, to be loaded before the real one: what torch links of it.
//
// Memory of the device is memory of the host, streams do at once what they are given, events know
// the time. A captured graph is a number: emulated_device.py keeps what is to be done, and is
// called where it is launched. No kernel runs: one that is launched has not been emulated, and ends
// the process. What CUDA refuses within a capture is refused, and spoils it. Device memory begins as
// 0xCD. EMULATED_GPU_GIGABYTES says how much there is.

#include <cuda.h>
#include <cuda_runtime_api.h>

#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>

namespace {

using Memory = std::map<uintptr_t, size_t>;  // begin -> bytes

struct Event {
  double milliseconds = 0;   // when it was recorded; 0 is never
  bool is_captured = false;  // as a part of a graph, which the host cannot ask for
};

size_t gigabytes() {
  const char *text = getenv("EMULATED_GPU_GIGABYTES");
  return text ? strtoull(text, nullptr, 10) : 139;  // of an H200
}

const size_t TOTAL = gigabytes() << 30;
constexpr size_t WIPED = size_t(256) << 20;  // larger blocks are left as the system gives them
constexpr unsigned char WIPE = 0xCD;

std::recursive_mutex lock;
std::map<const void *, std::string> kernels;  // by the host's function that stands for each
Memory device, pinned;
size_t used = 0;
cudaStream_t capturing = nullptr;
bool is_spoilt = false;  // the capture that is under way
unsigned long long num_captures = 0, num_streams = 0, num_graphs = 0;
cudaError_t last_error = cudaSuccess;
void (*replay)(unsigned long long) = nullptr;
void (*record_event)(void *) = nullptr;

double now() {
  auto passed = std::chrono::steady_clock::now().time_since_epoch();
  return std::chrono::duration<double, std::milli>(passed).count();
}

bool holds(const Memory &memory, const void *pointer) {
  auto place = memory.upper_bound(uintptr_t(pointer));
  return place != memory.begin() && uintptr_t(pointer) < (--place)->first + place->second;
}

cudaError_t failed(cudaError_t error, const char *what) {
  fprintf(stderr, "emulated GPU: %s: error %d\n", what, int(error));
  return last_error = error;
}

cudaError_t unless_capturing(const char *what) {
  if (!capturing) return cudaSuccess;
  is_spoilt = true;
  return failed(cudaErrorStreamCaptureUnsupported, what);
}

Event &event_of(cudaEvent_t event) { return *reinterpret_cast<Event *>(event); }

cudaError_t launched(const void *function) {
  std::lock_guard held(lock);
  auto found = kernels.find(function);
  fprintf(stderr, "emulated GPU: this kernel is not emulated: %s\n",
          found == kernels.end() ? "of a library" : found->second.c_str());
  abort();
}

cudaError_t allocate(void **pointer, size_t bytes, Memory &memory) {
  std::lock_guard held(lock);
  if (posix_memalign(pointer, 512, bytes ? bytes : 1))
    return last_error = cudaErrorMemoryAllocation;
  memory[uintptr_t(*pointer)] = bytes;
  return cudaSuccess;
}

cudaError_t copied(void *target, const void *source, size_t bytes) {
  std::lock_guard held(lock);
  if (auto error = unless_capturing("a copy within a capture, not by an operation")) return error;
  memmove(target, source, bytes);
  return cudaSuccess;
}

CUresult has_context(CUdevice, unsigned *flags, int *is_active) {
  if (flags) *flags = 0;
  if (is_active) *is_active = 1;
  return CUDA_SUCCESS;
}

CUresult done() { return CUDA_SUCCESS; }

}  // namespace

extern "C" {

// For emulated_device.py.

int emulated_is_capturing() { return capturing != nullptr; }
void emulated_spoil() { is_spoilt = true; }
void emulated_set_time(void *event) { reinterpret_cast<Event *>(event)->milliseconds = now(); }
void emulated_record_by(void (*function)(void *)) { record_event = function; }
unsigned long long emulated_last_graph() { return num_graphs; }
void emulated_replay_by(void (*function)(unsigned long long)) { replay = function; }

// Kernels.

void **__cudaRegisterFatBinary(void *) {
  static void *handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void **) {}
void __cudaUnregisterFatBinary(void **) {}
void __cudaRegisterVar(void **, char *, char *, const char *, int, size_t, int, int) {}
void __cudaRegisterFunction(void **, const char *function, char *, const char *name, int, uint3 *,
                            uint3 *, dim3 *, dim3 *, int *) {
  std::lock_guard held(lock);
  kernels[function] = name;
}
unsigned __cudaPushCallConfiguration(dim3, dim3, size_t, void *) { return 0; }
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  *grid = *block = dim3(1);
  *shared = 0;
  *static_cast<void **>(stream) = nullptr;
  return cudaSuccess;
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *function) {
  *kernel = cudaKernel_t(function);
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void **, size_t, cudaStream_t) {
  return launched(kernel);
}
cudaError_t cudaLaunchKernel(const void *function, dim3, dim3, void **, size_t, cudaStream_t) {
  return launched(function);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *, const void *function, void **) {
  return launched(function);
}
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes *attributes, const void *) {
  *attributes = {};
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *, cudaFuncAttribute, int) { return cudaSuccess; }
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *count, const void *, int,
                                                                   size_t, unsigned) {
  *count = 8;
  return cudaSuccess;
}

// The device.

cudaError_t cudaGetDeviceCount(int *count) {
  *count = 1;
  return cudaSuccess;
}
cudaError_t cudaGetDevice(int *number) {
  *number = 0;
  return cudaSuccess;
}
cudaError_t cudaSetDevice(int) { return cudaSuccess; }
cudaError_t cudaDeviceSynchronize() { return unless_capturing("cudaDeviceSynchronize"); }
cudaError_t cudaDriverGetVersion(int *version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}
cudaError_t cudaRuntimeGetVersion(int *version) { return cudaDriverGetVersion(version); }
cudaError_t cudaGetDeviceProperties(cudaDeviceProp *device_, int) {
  auto &properties = *device_ = {};
  strcpy(properties.name, "NVIDIA H200 (emulated)");
  properties.major = 9;
  properties.multiProcessorCount = 132;
  properties.totalGlobalMem = TOTAL;
  properties.warpSize = 32;
  properties.sharedMemPerBlock = 48 << 10;
  properties.sharedMemPerBlockOptin = 227 << 10;
  properties.sharedMemPerMultiprocessor = 228 << 10;
  properties.regsPerBlock = properties.regsPerMultiprocessor = 64 << 10;
  properties.maxThreadsPerBlock = 1024;
  properties.maxThreadsPerMultiProcessor = 2048;
  properties.maxBlocksPerMultiProcessor = 32;
  properties.l2CacheSize = 50 << 20;
  properties.maxThreadsDim[0] = properties.maxThreadsDim[1] = 1024;
  properties.maxThreadsDim[2] = 64;
  properties.maxGridSize[0] = 2147483647;
  properties.maxGridSize[1] = properties.maxGridSize[2] = 65535;
  properties.textureAlignment = 512;
  properties.unifiedAddressing = properties.concurrentKernels = 1;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
  static const std::map<cudaDeviceAttr, int> known = {
      {cudaDevAttrComputeCapabilityMajor, 9},       {cudaDevAttrComputeCapabilityMinor, 0},
      {cudaDevAttrMultiProcessorCount, 132},        {cudaDevAttrWarpSize, 32},
      {cudaDevAttrMaxSharedMemoryPerBlock, 48 << 10}, {cudaDevAttrMaxThreadsPerBlock, 1024},
      {cudaDevAttrMaxSharedMemoryPerBlockOptin, 227 << 10},
      {cudaDevAttrMaxThreadsPerMultiProcessor, 2048}};
  auto found = known.find(attribute);
  *value = found == known.end() ? 1 : found->second;
  return cudaSuccess;
}
cudaError_t cudaDeviceCanAccessPeer(int *can, int, int) {
  *can = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
cudaError_t cudaDeviceGetPCIBusId(char *text, int size, int) {
  snprintf(text, size, "0000:00:00.0");
  return cudaSuccess;
}
cudaError_t cudaDeviceGetStreamPriorityRange(int *least, int *greatest) {
  *least = 0;
  *greatest = -5;
  return cudaSuccess;
}
cudaError_t cudaGetDriverEntryPointByVersion(const char *name, void **function, unsigned,
                                             unsigned long long,
                                             cudaDriverEntryPointQueryResult *found) {
  bool asks = !strcmp(name, "cuDevicePrimaryCtxGetState");
  *function = asks ? reinterpret_cast<void *>(has_context) : reinterpret_cast<void *>(done);
  if (found) *found = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// Memory.

cudaError_t cudaMalloc(void **pointer, size_t bytes) {
  std::lock_guard held(lock);
  if (bytes > TOTAL - used) return last_error = cudaErrorMemoryAllocation;
  if (auto error = allocate(pointer, bytes, device)) return error;
  if (bytes < WIPED) memset(*pointer, WIPE, bytes);
  used += bytes;
  return cudaSuccess;
}
cudaError_t cudaMallocAsync(void **pointer, size_t bytes, cudaStream_t) {
  return cudaMalloc(pointer, bytes);
}
cudaError_t cudaFree(void *pointer) {
  std::lock_guard held(lock);
  if (!pointer) return cudaSuccess;
  if (auto error = unless_capturing("cudaFree")) return error;
  auto found = device.find(uintptr_t(pointer));
  if (found == device.end()) return failed(cudaErrorInvalidValue, "cudaFree");
  used -= found->second;
  device.erase(found);
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t) { return cudaFree(pointer); }
cudaError_t cudaMemGetInfo(size_t *free_, size_t *total) {
  *free_ = TOTAL - used;
  *total = TOTAL;
  return cudaSuccess;
}
cudaError_t cudaHostAlloc(void **pointer, size_t bytes, unsigned) {
  return allocate(pointer, bytes, pinned);
}
cudaError_t cudaHostRegister(void *pointer, size_t bytes, unsigned) {
  std::lock_guard held(lock);
  pinned[uintptr_t(pointer)] = bytes;
  return cudaSuccess;
}
cudaError_t cudaHostUnregister(void *pointer) {
  std::lock_guard held(lock);
  pinned.erase(uintptr_t(pointer));
  return cudaSuccess;
}
cudaError_t cudaFreeHost(void *pointer) {
  cudaHostUnregister(pointer);
  free(pointer);
  return cudaSuccess;
}
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes *attributes, const void *pointer) {
  std::lock_guard held(lock);
  *attributes = {};
  attributes->type = holds(device, pointer)   ? cudaMemoryTypeDevice
                     : holds(pinned, pointer) ? cudaMemoryTypeHost
                                              : cudaMemoryTypeUnregistered;
  attributes->hostPointer = const_cast<void *>(pointer);
  if (attributes->type != cudaMemoryTypeUnregistered)
    attributes->devicePointer = attributes->hostPointer;
  return cudaSuccess;
}
cudaError_t cudaMemcpy(void *target, const void *source, size_t bytes, cudaMemcpyKind) {
  return copied(target, source, bytes);
}
cudaError_t cudaMemcpyAsync(void *target, const void *source, size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  return copied(target, source, bytes);
}
cudaError_t cudaMemcpyPeerAsync(void *target, int, const void *source, int, size_t bytes,
                                cudaStream_t) {
  return copied(target, source, bytes);
}
cudaError_t cudaMemcpyToSymbol(const void *, const void *, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;
}
cudaError_t cudaMemset(void *target, int value, size_t bytes) {
  if (auto error = unless_capturing("a memset within a capture, not by an operation")) return error;
  memset(target, value, bytes);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *target, int value, size_t bytes, cudaStream_t) {
  return cudaMemset(target, value, bytes);
}

// Streams and events.

cudaError_t cudaStreamCreateWithPriority(cudaStream_t *stream, unsigned, int) {
  *stream = cudaStream_t(64 * (16 + ++num_streams));
  return cudaSuccess;
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamGetPriority(cudaStream_t, int *priority) {
  *priority = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamQuery(cudaStream_t) { return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t) {
  return unless_capturing("cudaStreamSynchronize");
}
cudaError_t cudaStreamWaitEvent(cudaStream_t, cudaEvent_t, unsigned) { return cudaSuccess; }
cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t call, void *data,
                                  unsigned) {
  call(stream, cudaSuccess, data);
  return cudaSuccess;
}
cudaError_t cudaLaunchHostFunc(cudaStream_t, cudaHostFn_t call, void *data) {
  call(data);
  return cudaSuccess;
}
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned) {
  *event = cudaEvent_t(new Event);
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { return cudaEventCreateWithFlags(event, 0); }
cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete reinterpret_cast<Event *>(event);
  return cudaSuccess;
}
cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t, unsigned flags) {
  bool is_external = flags & cudaEventRecordExternal;  // to be recorded at each replay
  event_of(event).is_captured = capturing && !is_external;
  if (capturing && is_external && record_event)
    record_event(event);
  else
    event_of(event).milliseconds = now();
  return cudaSuccess;
}
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return cudaEventRecordWithFlags(event, stream, cudaEventRecordDefault);
}
cudaError_t cudaEventQuery(cudaEvent_t event) {
  if (event_of(event).is_captured) return failed(cudaErrorCapturedEvent, "cudaEventQuery");
  return unless_capturing("cudaEventQuery");
}
cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event_of(event).is_captured) return failed(cudaErrorCapturedEvent, "cudaEventSynchronize");
  return unless_capturing("cudaEventSynchronize");
}
cudaError_t cudaEventElapsedTime(float *passed, cudaEvent_t from, cudaEvent_t to) {
  const char *name = "cudaEventElapsedTime";
  if (event_of(from).is_captured || event_of(to).is_captured)
    return failed(cudaErrorCapturedEvent, name);
  double start = event_of(from).milliseconds, end = event_of(to).milliseconds;
  if (!start || !end) return failed(cudaErrorInvalidResourceHandle, name);
  *passed = float(end - start);
  return cudaSuccess;
}

// Graphs.

cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode) {
  if (capturing || !stream)
    return failed(cudaErrorStreamCaptureUnsupported, "cudaStreamBeginCapture");
  capturing = stream;
  is_spoilt = false;
  ++num_captures;
  return cudaSuccess;
}
cudaError_t cudaStreamEndCapture(cudaStream_t, cudaGraph_t *graph) {
  capturing = nullptr;
  if (is_spoilt) return failed(cudaErrorStreamCaptureInvalidated, "cudaStreamEndCapture");
  *graph = cudaGraph_t(++num_graphs);
  return cudaSuccess;
}
cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus *status,
                                     unsigned long long *id, cudaGraph_t *graph,
                                     const cudaGraphNode_t **nodes, const cudaGraphEdgeData **edges,
                                     size_t *num_nodes) {
  bool is_active = capturing && stream == capturing;
  *status = is_active ? cudaStreamCaptureStatusActive : cudaStreamCaptureStatusNone;
  if (id) *id = is_active ? num_captures : 0;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (num_nodes) *num_nodes = 0;
  return cudaSuccess;
}
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus *status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode *) { return cudaSuccess; }
cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t *runnable, cudaGraph_t graph,
                                          unsigned long long) {
  *runnable = cudaGraphExec_t(graph);
  return cudaSuccess;
}
cudaError_t cudaGraphInstantiate(cudaGraphExec_t *runnable, cudaGraph_t graph,
                                 unsigned long long flags) {
  return cudaGraphInstantiateWithFlags(runnable, graph, flags);
}
cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t) {
  if (!replay) return failed(cudaErrorUnknown, "cudaGraphLaunch, and nobody replays");
  replay(reinterpret_cast<unsigned long long>(graph));
  return cudaSuccess;
}
cudaError_t cudaGraphDestroy(cudaGraph_t) { return cudaSuccess; }
cudaError_t cudaGraphExecDestroy(cudaGraphExec_t) { return cudaSuccess; }
cudaError_t cudaGraphGetNodes(cudaGraph_t, cudaGraphNode_t *, size_t *count) {
  *count = 1;  // torch warns of an empty graph
  return cudaSuccess;
}

// Errors.

cudaError_t cudaPeekAtLastError() { return last_error; }
cudaError_t cudaGetLastError() {
  cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}
const char *cudaGetErrorName(cudaError_t) { return "error of the emulated GPU"; }
const char *cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorStreamCaptureUnsupported:
      return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated:
      return "operation failed due to a previous error during capture";
    case cudaErrorCapturedEvent: return "event was recorded in a capturing stream";
    default: return "error of the emulated GPU";
  }
}

// cuBLAS: torch asks for a handle before products, which emulated_operations.py does.

int cublasCreate_v2(void **handle) {
  *handle = malloc(1);
  return 0;
}
int cublasDestroy_v2(void *) { return 0; }
int cublasSetStream_v2(void *, void *) { return 0; }
int cublasSetWorkspace_v2(void *, void *, size_t) { return 0; }
int cublasGetMathMode(void *, int *mode) { return *mode = 0; }
int cublasSetMathMode(void *, int) { return 0; }
}
