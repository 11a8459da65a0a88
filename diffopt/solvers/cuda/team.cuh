// A team of threads that works on one problem: a whole block, or one warp of it.
//
// All of the text in this folder is written against a team, so that the same lines make all variants. A function
// that takes a team is called by all of its threads, and may be left without a barrier only where it says so.
#pragma once

#ifndef DIFFOPT_SHIM
#define DIFFOPT_WARP 32
#endif

// A function of some length that several places call: compiled once for each team and dtype. With all of it inline the
// compiler takes a minute.
#define DIFFOPT_STEP __device__ __noinline__

namespace diffopt {

constexpr int WARP = DIFFOPT_WARP;
constexpr unsigned EVERY_LANE = 0xffffffffu;

// A block's shared memory.
#ifndef DIFFOPT_SHIM
extern __shared__ double dynamic_shared[];
__device__ inline double* shared_memory() { return dynamic_shared; }
#endif

// NaN, and infinity, compared by arithmetic: run-time compilation comes without headers.
__device__ inline bool finite(double v) { return v - v == 0.0; }

// Unlike fmax, a NaN on either side wins: what is broken must not look small.
__device__ inline double larger(double a, double b) { return a >= b || a != a ? a : b; }

struct Sum {
    __device__ static double of(double a, double b) { return a + b; }
};
struct Max {
    __device__ static double of(double a, double b) { return larger(a, b); }
};

// The same address, known to the compiler to be in shared memory: it cannot see that through a structure or a call, and a
// load from an unknown kind of memory takes longer. For the heads of loops that matter.
#ifdef DIFFOPT_SHIM
template <class T>
__device__ inline T* in_shared(T* p) {
    return p;
}
#else
template <class T>
__device__ inline T* in_shared(T* p) {
    const unsigned offset = unsigned(__cvta_generic_to_shared(p)) - unsigned(__cvta_generic_to_shared(dynamic_shared));
    return reinterpret_cast<T*>(dynamic_shared) + offset / sizeof(T);
}
#endif

// The same bits in every lane: a butterfly adds the same pairs on both sides.
template <class Op>
__device__ inline double across_warp(double v) {
    for (int other = WARP / 2; other > 0; other /= 2) v = Op::of(v, __shfl_xor_sync(EVERY_LANE, v, other));
    return v;
}

// Who works on a problem, and where it lies. Vectors are in shared memory always; matrices too, but where they are too
// large for it: then in global memory, where the cache keeps those that are iterated on.
enum class Variant { warp, block, large };

// scratch: one double a thread, and flag: one int, both shared by the team.
template <Variant VARIANT>
struct Team {
    static constexpr bool WHOLE_BLOCK = VARIANT != Variant::warp, LARGE = VARIANT == Variant::large;

    int rank, size;
    double* scratch;
    int* flag;

    // The same matrix, known to the compiler to be in shared memory if it is.
    template <class Matrix>
    __device__ Matrix matrix(const Matrix& M) const {
        if constexpr (LARGE) {
            return M;
        } else {
            return in_shared(M);
        }
    }

    __device__ int lane() const { return rank % WARP; }
    __device__ int warp() const { return rank / WARP; }
    __device__ int warps() const { return size / WARP; }

    __device__ void sync() const {
        if constexpr (WHOLE_BLOCK) {
            __syncthreads();
        } else {
            __syncwarp();
        }
    }

    // Combine each v[i] over the team; all threads get the result, in an order that is always the same. A barrier, too.
    template <class Op, int N>
    __device__ void combine(double (&v)[N]) const;

    template <int N>
    __device__ void sum(double (&v)[N]) const {
        combine<Sum>(v);
    }
    template <int N>
    __device__ void max(double (&v)[N]) const {
        combine<Max>(v);
    }
    __device__ bool any(bool mine) const {
        double v[1] = {mine ? 1.0 : 0.0};
        max(v);
        return v[0] > 0;
    }
};

constexpr int CHUNK = WARP < 4 ? WARP : 4;    // numbers whose shuffles overlap
constexpr int ROUND = WARP < 16 ? WARP : 16;  // numbers of each warp that the scratch memory takes at a time

// What `Team::combine` does, for `count` numbers, a multiple of CHUNK. Compiled once: inline it would be most of the code.
template <class Op, class Team>
DIFFOPT_STEP void combine_over(const Team& team, double* v, int count) {
    if constexpr (!Team::WHOLE_BLOCK) team.sync();  // shuffles alone order no memory
#pragma unroll 1
    for (int first = 0; first < count; first += CHUNK) {
        double part[CHUNK];
        for (int b = 0; b < CHUNK; ++b) part[b] = v[first + b];
        for (int other = WARP / 2; other > 0; other /= 2) {
            for (int b = 0; b < CHUNK; ++b) part[b] = Op::of(part[b], __shfl_xor_sync(EVERY_LANE, part[b], other));
        }
        for (int b = 0; b < CHUNK; ++b) v[first + b] = part[b];
    }
    if constexpr (Team::WHOLE_BLOCK) {
        double* scratch = in_shared(team.scratch);
#pragma unroll 1
        for (int first = 0; first < count; first += ROUND) {
            const int here = count - first < ROUND ? count - first : ROUND;
            if (team.lane() < here) scratch[team.warp() * ROUND + team.lane()] = v[first + team.lane()];
            team.sync();
            if (team.rank < here) {
                double all = scratch[team.rank];
#pragma unroll 4
                for (int w = 1; w < team.warps(); ++w) all = Op::of(all, scratch[w * ROUND + team.rank]);
                scratch[team.rank] = all;  // nobody else reads this column
            }
            team.sync();
#pragma unroll 1
            for (int k = 0; k < here; ++k) v[first + k] = scratch[k];
            team.sync();  // the scratch memory is free again
        }
    }
}

template <Variant VARIANT>
template <class Op, int N>
__device__ inline void Team<VARIANT>::combine(double (&v)[N]) const {
    constexpr int PADDED = (N + CHUNK - 1) / CHUNK * CHUNK;
    double all[PADDED];
#pragma unroll
    for (int k = 0; k < PADDED; ++k) all[k] = k < N ? v[k] : 0.0;
    combine_over<Op>(*this, all, PADDED);
#pragma unroll
    for (int k = 0; k < N; ++k) v[k] = all[k];
}

}  // namespace diffopt
