// Just enough of CUDA for g++ to compile a kernel and its launcher unchanged, so that a machine
// without a GPU can run the very code that the GPU runs. For tests only: correct, not fast.
//
// A block's threads are fibers that run one after another in a ring and hand over at every
// __syncthreads or shuffle; blocks run one after another. All threads of a block must reach the same
// synchronisation points, which is stricter than CUDA for shuffles; the shim stops the program if they
// do not.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __shared__ static  // one block at a time, so one copy is enough

struct uint4 {
    unsigned x, y, z, w;
};

struct dim3 {
    unsigned x, y, z;
    dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};

// ---- errors ---------------------------------------------------------------------------------------

enum cudaError_t {
    cudaSuccess = 0,
    cudaErrorInvalidValue = 1,
    cudaErrorInvalidConfiguration = 9,
    cudaErrorMisalignedAddress = 716
};

namespace shim {
inline cudaError_t last_error = cudaSuccess;
}

inline cudaError_t cudaGetLastError() {
    const cudaError_t error = shim::last_error;
    shim::last_error = cudaSuccess;
    return error;
}

inline cudaError_t cudaSetDevice(int) { return cudaSuccess; }

// ---- threads --------------------------------------------------------------------------------------

inline dim3 threadIdx(0), blockIdx(0), blockDim, gridDim;

namespace shim {

enum class Point { kBarrier, kExchangeWrite, kExchangeRead, kBlockEnd };

constexpr size_t kStackBytes = 64 * 1024;

struct Fiber {
    ucontext_t start;
    void* resume[5];  // of __builtin_setjmp: unlike swapcontext, it makes no system call
    bool started = false;
};

inline std::vector<Fiber> fibers;
inline std::vector<uint32_t> exchanged;  // one word a thread
inline Point first_thread_at;
inline unsigned running;  // number of the running thread in its block

[[noreturn]] inline void switch_to(unsigned thread) {
    running = thread;
    threadIdx.x = thread % blockDim.x;
    threadIdx.y = thread / blockDim.x;
    Fiber& fiber = fibers[thread];
    if (fiber.started) __builtin_longjmp(fiber.resume, 1);
    fiber.started = true;
    setcontext(&fiber.start);
    std::abort();
}

// Hand over to the next thread of the ring; come back once all the others have been here.
[[gnu::noinline]] inline void wait_at(Point point) {
    const unsigned self = running;
    if (self == 0) first_thread_at = point;
    if (point != first_thread_at) {
        std::fprintf(stderr, "threads 0 and %u of block %u wait at different points\n", self, blockIdx.x);
        std::abort();
    }
    if (__builtin_setjmp(fibers[self].resume) == 0) switch_to((self + 1) % fibers.size());
}

inline std::function<void()> kernel_call;
inline ucontext_t launcher;

inline void run_thread() {
    for (unsigned block = 0; block < gridDim.x; ++block) {
        blockIdx.x = block;
        kernel_call();
        wait_at(Point::kBlockEnd);
    }
    if (running + 1 == fibers.size()) setcontext(&launcher);
    switch_to(running + 1);
}

inline void run_grid() {
    static std::vector<char> stacks;
    stacks.resize(fibers.size() * kStackBytes);
    for (size_t t = 0; t < fibers.size(); ++t) {
        getcontext(&fibers[t].start);
        fibers[t].start.uc_stack.ss_sp = stacks.data() + t * kStackBytes;
        fibers[t].start.uc_stack.ss_size = kStackBytes;
        fibers[t].start.uc_link = nullptr;
        makecontext(&fibers[t].start, run_thread, 0);
    }
    volatile bool returned = false;
    getcontext(&launcher);
    if (!returned) {
        returned = true;
        switch_to(0);
    }
}

// Every thread puts a word in; `read` sees those of its warp.
template <typename T, typename Read>
auto exchange(T value, Read read) {
    static_assert(sizeof(T) == sizeof(uint32_t), "one word");
    std::memcpy(&exchanged[running], &value, sizeof(T));
    wait_at(Point::kExchangeWrite);
    const auto result = read(&exchanged[running / 32 * 32]);
    wait_at(Point::kExchangeRead);
    return result;
}

}  // namespace shim

inline void __syncthreads() { shim::wait_at(shim::Point::kBarrier); }

inline float __shfl_xor_sync(unsigned, float value, int lane_mask) {
    const unsigned lane = shim::running % 32 ^ static_cast<unsigned>(lane_mask);
    return shim::exchange(value, [lane](const uint32_t* of_warp) {
        float other;
        std::memcpy(&other, of_warp + lane, sizeof(other));
        return other;
    });
}

// ---- launching ------------------------------------------------------------------------------------

using cudaStream_t = void*;

struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
};

template <typename... Parameters, typename... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
    const dim3 grid = config->gridDim, block = config->blockDim;
    const size_t threads = size_t{block.x} * block.y;
    if (grid.x == 0 || grid.x > INT32_MAX || grid.y != 1 || grid.z != 1 || block.z != 1 ||
        threads == 0 || threads > 1024 || threads % 32 != 0) {
        return shim::last_error = cudaErrorInvalidConfiguration;
    }
    gridDim = grid;
    blockDim = block;
    shim::fibers.assign(threads, {});
    shim::exchanged.assign(threads, 0);
    shim::kernel_call = [&] { kernel(arguments...); };
    shim::run_grid();
    return cudaSuccess;
}

// ---- memory: the loads and stores that need 16-byte alignment check it -----------------------------

namespace shim {
template <typename T>
const T* checked(const T* address) {
    if (reinterpret_cast<uintptr_t>(address) % sizeof(T) != 0) last_error = cudaErrorMisalignedAddress;
    return address;
}
template <typename T>
T load(const T* address) {
    T value;
    std::memcpy(&value, static_cast<const void*>(checked(address)), sizeof(T));
    return value;
}
}  // namespace shim

inline uint4 __ldg(const uint4* address) { return shim::load(address); }
inline uint4 __ldcs(const uint4* address) { return shim::load(address); }
inline void __stcg(uint4* address, uint4 value) {
    std::memcpy(const_cast<void*>(static_cast<const void*>(shim::checked(address))), &value, sizeof(value));
}

// ---- fp16 and bf16, rounded to nearest even -------------------------------------------------------

struct __half {
    uint16_t bits;
};
struct __nv_bfloat16 {
    uint16_t bits;
};

namespace shim {
inline uint32_t bits_of(float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, sizeof(bits));
    return bits;
}
inline float float_of(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof(value));
    return value;
}
}  // namespace shim

inline float __bfloat162float(__nv_bfloat16 a) { return shim::float_of(uint32_t{a.bits} << 16); }

inline __nv_bfloat16 __float2bfloat16_rn(float a) {
    if (std::isnan(a)) return {0x7fff};
    const uint32_t bits = shim::bits_of(a);
    return {static_cast<uint16_t>((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
}

inline float __half2float(__half a) {
    const int exponent = (a.bits >> 10) & 0x1f;
    const int mantissa = a.bits & 0x3ff;
    const float sign = a.bits & 0x8000 ? -1.0f : 1.0f;
    if (exponent == 31) return sign * (mantissa ? NAN : INFINITY);
    if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
    return sign * std::ldexp(static_cast<float>(mantissa | 0x400), exponent - 25);
}

inline __half __float2half_rn(float a) {
    const uint16_t sign = static_cast<uint16_t>((shim::bits_of(a) >> 16) & 0x8000);
    const float magnitude = std::fabs(a);
    if (std::isnan(a)) return {0x7fff};
    if (magnitude >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};  // half a step above the largest
    if (magnitude < 0x1p-14f) {  // subnormal: a multiple of 2^-24; nearbyint rounds to nearest even
        return {static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(magnitude * 0x1p24f)))};
    }
    const uint32_t bits = shim::bits_of(magnitude) - (112u << 23);  // exponent bias 127 -> 15
    return {static_cast<uint16_t>(sign | ((bits + 0xfff + ((bits >> 13) & 1)) >> 13))};
}
