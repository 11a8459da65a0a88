// The kernels behind a C interface, for ctypes.
#include "shim.hpp"

#include "kernels.cu"

#define EACH_KERNEL(_) _(solve_block) _(solve_warp) _(pullback_block) _(pullback_warp)

// Returns how many arguments the kernel has, -1 if there is no such kernel; runs it if that is `count`.
extern "C" int shim_launch(
    const char* name, long long grid, long long threads, long long bytes, const long long* words, long long count) {
#define IF_NAMED(kernel)                                                                           \
    if (std::string(name) == "diffopt_" #kernel) {                                                 \
        const int arguments = shim::count(diffopt::diffopt_##kernel);                              \
        if (arguments == count) {                                                                  \
            shim::launch(diffopt::diffopt_##kernel, unsigned(grid), int(threads), bytes, words);   \
        }                                                                                          \
        return arguments;                                                                          \
    }
    EACH_KERNEL(IF_NAMED)
    return -1;
}

// Sizes that the Python side computes for itself: shared doubles of a forward and of a backward team, numbers kept.
extern "C" void shim_sizes(int n, int p, int m, int lower, int upper, int threads, long long* sizes) {
    const diffopt::Sizes z(n, p, m, lower, upper);
    sizes[0] = diffopt::Memory::size(z, threads);
    sizes[1] = diffopt::BackwardMemory::size(z, threads);
    sizes[2] = diffopt::Kept::size(z);
}

extern "C" int shim_warp() { return diffopt::WARP; }
