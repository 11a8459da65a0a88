// The kernels, compiled at run time for one dtype (DIFFOPT_REAL), and by a host compiler in tests.
//
// "block": one problem for each block. "warp": one for each warp, so that a block's shared memory holds several
// problems, `words` doubles for each. "large": one for each block, its matrices in global memory. A team may get several
// problems, one after the other. In any case a problem's result depends on nothing but its own data.
#include "interior_point.cuh"
#include "pullback.cuh"

namespace diffopt {

// Threads of a block, and blocks of a multiprocessor that the registers must suffice for.
#define DIFFOPT_BOUNDS __launch_bounds__(256, 2)

#define DIFFOPT_PARAMETER(type, name) type name,
#define DIFFOPT_NAME(type, name) name,
// The arguments end in the doubles of shared memory that each problem takes.
#define DIFFOPT_KERNEL(kernel, Task, ARGUMENTS, variant, run)                                                        \
    extern "C" __global__ void DIFFOPT_BOUNDS kernel(ARGUMENTS(DIFFOPT_REAL, DIFFOPT_PARAMETER) long long words) {   \
        using Own = Team<Variant::variant>;                                                                          \
        const Task<DIFFOPT_REAL> task = {ARGUMENTS(DIFFOPT_REAL, DIFFOPT_NAME)};                                     \
        const int problems = Own::WHOLE_BLOCK ? 1 : int(blockDim.x) / WARP;                                          \
        const int slot = Own::WHOLE_BLOCK ? 0 : int(threadIdx.x) / WARP;                                             \
        const int size = Own::WHOLE_BLOCK ? int(blockDim.x) : WARP;                                                  \
        const long long place = (long long)blockIdx.x * problems + slot;                                             \
        Own team = {int(threadIdx.x) - slot * size, size, nullptr, nullptr};                                         \
        for (long long i = place; i < task.batch; i += (long long)gridDim.x * problems) {                            \
            run(team, task, i, place, shared_memory() + slot * words);                                               \
            team.sync(); /* the next problem takes the same memory */                                                \
        }                                                                                                            \
    }

// Compiling takes seconds a kernel, so at run time only the one that is wanted is: bit k of DIFFOPT_ONLY.
#ifndef DIFFOPT_ONLY
#define DIFFOPT_ONLY 63
#endif

#if DIFFOPT_ONLY & 1
DIFFOPT_KERNEL(diffopt_solve_block, Forward, DIFFOPT_FORWARD_ARGUMENTS, block, solve_instance)
#endif
#if DIFFOPT_ONLY & 2
DIFFOPT_KERNEL(diffopt_solve_warp, Forward, DIFFOPT_FORWARD_ARGUMENTS, warp, solve_instance)
#endif
#if DIFFOPT_ONLY & 4
DIFFOPT_KERNEL(diffopt_solve_large, Forward, DIFFOPT_FORWARD_ARGUMENTS, large, solve_instance)
#endif
#if DIFFOPT_ONLY & 8
DIFFOPT_KERNEL(diffopt_pullback_block, Backward, DIFFOPT_BACKWARD_ARGUMENTS, block, pull_back)
#endif
#if DIFFOPT_ONLY & 16
DIFFOPT_KERNEL(diffopt_pullback_warp, Backward, DIFFOPT_BACKWARD_ARGUMENTS, warp, pull_back)
#endif
#if DIFFOPT_ONLY & 32
DIFFOPT_KERNEL(diffopt_pullback_large, Backward, DIFFOPT_BACKWARD_ARGUMENTS, large, pull_back)
#endif

}  // namespace diffopt
