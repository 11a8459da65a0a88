// The C interface of the CPU executor. (Being written.)
#include <cstdint>

#if defined(_WIN32)
#define DIFFOPT_API extern "C" __declspec(dllexport)
#else
#define DIFFOPT_API extern "C" __attribute__((visibility("default")))
#endif

DIFFOPT_API int32_t diffopt_abi() { return 1; }

// The widest instruction set of this machine: 0 baseline, 1 AVX2 + FMA, 2 AVX-512 (F, DQ, VL, BW).
DIFFOPT_API int32_t diffopt_cpu_level() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
        __builtin_cpu_supports("avx512bw"))
        return 2;
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return 1;
#endif
    return 0;
}
