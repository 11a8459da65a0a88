// The kernels, compiled at run time for one dtype (DIFFOPT_REAL), and by a host compiler in tests.
//
// "block": one problem for each block. "warp": one for each warp, so that a block's shared memory holds several
// problems, `words` doubles for each. Either way a problem's result depends on nothing but its own data.
#include "interior_point.cuh"
#include "pullback.cuh"

namespace diffopt {

// Threads of a block, and blocks of a multiprocessor that the registers must suffice for.
#define DIFFOPT_BOUNDS __launch_bounds__(256, 2)

#define DIFFOPT_PARAMETER(type, name) type name,
#define DIFFOPT_NAME(type, name) name,
// The arguments end in the doubles of shared memory that each problem takes.
#define DIFFOPT_KERNEL(kernel, Task, ARGUMENTS, WHOLE_BLOCK, run)                                                    \
    extern "C" __global__ void DIFFOPT_BOUNDS kernel(ARGUMENTS(DIFFOPT_REAL, DIFFOPT_PARAMETER) long long words) {   \
        const Task<DIFFOPT_REAL> task = {ARGUMENTS(DIFFOPT_REAL, DIFFOPT_NAME)};                                     \
        const int problems = WHOLE_BLOCK ? 1 : int(blockDim.x) / WARP;                                               \
        const int slot = WHOLE_BLOCK ? 0 : int(threadIdx.x) / WARP;                                                  \
        const int size = WHOLE_BLOCK ? int(blockDim.x) : WARP;                                                       \
        const long long i = (long long)blockIdx.x * problems + slot;                                                 \
        if (i >= task.batch) return;                                                                                 \
        Team<WHOLE_BLOCK> team = {int(threadIdx.x) - slot * size, size, nullptr, nullptr};                           \
        run(team, task, i, shared_memory() + slot * words);                                                          \
    }

// Compiling takes seconds a kernel, so at run time only the one that is wanted is: bit k of DIFFOPT_ONLY.
#ifndef DIFFOPT_ONLY
#define DIFFOPT_ONLY 15
#endif

#if DIFFOPT_ONLY & 1
DIFFOPT_KERNEL(diffopt_solve_block, Forward, DIFFOPT_FORWARD_ARGUMENTS, true, solve_instance)
#endif
#if DIFFOPT_ONLY & 2
DIFFOPT_KERNEL(diffopt_solve_warp, Forward, DIFFOPT_FORWARD_ARGUMENTS, false, solve_instance)
#endif
#if DIFFOPT_ONLY & 4
DIFFOPT_KERNEL(diffopt_pullback_block, Backward, DIFFOPT_BACKWARD_ARGUMENTS, true, pull_back)
#endif
#if DIFFOPT_ONLY & 8
DIFFOPT_KERNEL(diffopt_pullback_warp, Backward, DIFFOPT_BACKWARD_ARGUMENTS, false, pull_back)
#endif

}  // namespace diffopt
