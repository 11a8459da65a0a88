// The kernels behind a C interface, for ctypes.
#include "shim.hpp"

#include "kernels.cu"

#define EACH_KERNEL(_) \
    _(solve_block) _(solve_warp) _(solve_large) _(pullback_block) _(pullback_warp) _(pullback_large)

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

// Sizes that the Python side computes for itself: shared doubles of a forward and of a backward team, numbers kept, and
// the workspace of a large problem.
extern "C" void shim_sizes(int n, int p, int m, int lower, int upper, int threads, int large, long long* sizes) {
    const diffopt::Sizes z(n, p, m, lower, upper);
    sizes[0] = diffopt::Memory::size(z, threads, large);
    sizes[1] = diffopt::BackwardMemory::size(z, threads, large);
    sizes[2] = diffopt::Kept::size(z);
    sizes[3] = diffopt::Memory::far(z);
}

extern "C" int shim_warp() { return diffopt::WARP; }
