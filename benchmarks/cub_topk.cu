// Row top-k by cub::DeviceBatchedTopK, which CUB has had since 3.5 (CUDA Toolkit 13.5, or the headers in the package
// cuda-cccl): https://nvidia.github.io/cccl/unstable/cub/api/structcub_1_1DeviceBatchedTopK.html
//
// cub.py compiles this for one key type and one largest width, given as KEY and MOST, because CUB specialises on both.
#include <cub/device/device_batched_topk.cuh>
#include <cuda/iterator>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

template <typename T>
struct Row {
  T* first;
  long long width;
  __host__ __device__ T* operator()(long long row) const { return first + row * width; }
};

template <typename T>
auto rows_of(T* first, long long width) {
  return cuda::transform_iterator(cuda::counting_iterator<long long>(0), Row<T>{first, width});
}

template <typename Requirements>
int run(void* storage, size_t* bytes, const KEY* keys, KEY* values, int* indices, long long rows, long long width,
        long long k, cudaStream_t stream, Requirements requirements) {
  auto env = cuda::std::execution::env{cuda::stream_ref{stream}, requirements};
  return cub::DeviceBatchedTopK::MaxPairs(
      storage, *bytes, rows_of(keys, width), rows_of(values, k),
      cuda::constant_iterator(cuda::counting_iterator<int>(0)), rows_of(indices, k),
      cuda::args::immediate{width, cuda::args::bounds<1, MOST>()}, cuda::args::immediate{k, cuda::args::bounds<1, MOST>()},
      cuda::args::immediate{rows}, env);
}

// Keys (rows, width), values and indices (rows, k), all row-major. Without storage it only sets *bytes. Returns CUDA's
// error code. `lowest`: of equal keys at the cut those of lowest index are kept; otherwise chance decides.
extern "C" int cub_topk(void* storage, size_t* bytes, const void* keys, void* values, int* indices, long long rows,
                        long long width, long long k, int lowest, void* stream) {
  namespace ex = cuda::execution;
  auto call = [&](auto requirements) {
    return run(storage, bytes, static_cast<const KEY*>(keys), static_cast<KEY*>(values), indices, rows, width, k,
               static_cast<cudaStream_t>(stream), requirements);
  };
  return lowest ? call(ex::require(ex::determinism::gpu_to_gpu, ex::tie_break::prefer_smaller_index,
                                   ex::output_ordering::unsorted))
                : call(ex::require(ex::determinism::not_guaranteed, ex::tie_break::unspecified,
                                   ex::output_ordering::unsorted));
}

extern "C" int cub_version() { return CUB_VERSION; }
