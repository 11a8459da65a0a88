// Enough of CUDA's language for a host compiler to run the kernels: a std::thread for each CUDA thread of a block, blocks one
// after the other, or all at once. Barriers are std::barrier, so that a thread sanitizer sees what they order and what nothing orders.
#pragma once

#include <algorithm>
#include <atomic>
#include <barrier>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#define DIFFOPT_SHIM
#ifndef DIFFOPT_WARP
#define DIFFOPT_WARP 4
#endif
// After the standard headers, some of which use these words.
#define __device__
#define __host__
#define __global__
#define __noinline__ __attribute__((noinline))
#define __launch_bounds__(...)

namespace shim {

struct Index {
    unsigned x;
};

struct Warp {
    explicit Warp(int lanes) : barrier(lanes) {}
    std::barrier<> barrier;
    double exchange[DIFFOPT_WARP];
};

struct Block {
    Block(int threads, size_t doubles) : barrier(threads), shared(doubles, std::numeric_limits<double>::quiet_NaN()) {
        for (int first = 0; first < threads; first += DIFFOPT_WARP) warps.push_back(std::make_unique<Warp>(DIFFOPT_WARP));
    }
    std::barrier<> barrier;
    std::vector<double> shared;  // starts as NaN: what is read before it is written shows
    std::vector<std::unique_ptr<Warp>> warps;
};

struct Mine {
    Block* block;
    Index thread, of_grid, size, grid;
    Warp& warp() const { return *block->warps[thread.x / DIFFOPT_WARP]; }
};

inline thread_local Mine mine;

}  // namespace shim

#define threadIdx shim::mine.thread
#define blockIdx shim::mine.of_grid
#define blockDim shim::mine.size
#define gridDim shim::mine.grid

inline void __syncthreads() {
    if (blockDim.x > 1) shim::mine.block->barrier.arrive_and_wait();
}

inline void __syncwarp() {
    if (DIFFOPT_WARP > 1) shim::mine.warp().barrier.arrive_and_wait();
}

inline double __shfl_xor_sync(unsigned, double value, int other) {
    const int lane = threadIdx.x % DIFFOPT_WARP;
    shim::mine.warp().exchange[lane] = value;
    __syncwarp();
    const double result = shim::mine.warp().exchange[lane ^ other];
    __syncwarp();
    return result;
}

inline int atomicAdd(int* at, int by) { return std::atomic_ref<int>(*at).fetch_add(by); }

namespace diffopt {

inline double* shared_memory() { return shim::mine.block->shared.data(); }

}  // namespace diffopt

namespace shim {

// Launch a kernel whose arguments are 8 bytes each.
template <class... Arguments, size_t... I>
void launch(void (*kernel)(Arguments...), std::index_sequence<I...>, unsigned grid, int threads, size_t bytes,
            const long long* words, bool at_once) {
    std::vector<std::thread> all;
    auto join = [&] {
        for (auto& thread : all) thread.join();
        all.clear();
    };
    std::vector<std::unique_ptr<Block>> blocks;
    for (unsigned i = 0; i < grid; ++i) {
        if (!at_once) blocks.clear();
        blocks.push_back(std::make_unique<Block>(threads, bytes / sizeof(double)));
        auto run = [=, block = blocks.back().get()](unsigned rank) {
            mine = {block, {rank}, {i}, {unsigned(threads)}, {grid}};
            kernel(std::bit_cast<Arguments>(words[I])...);
        };
        if (threads == 1) {
            run(0);
            continue;
        }
        for (int rank = 0; rank < threads; ++rank) all.emplace_back(run, rank);
        if (!at_once) join();
    }
    join();
}

template <class... Arguments>
void launch(void (*kernel)(Arguments...), unsigned grid, int threads, size_t bytes, const long long* words,
            bool at_once = false) {
    launch(kernel, std::index_sequence_for<Arguments...>{}, grid, threads, bytes, words, at_once);
}

template <class... Arguments>
constexpr int count(void (*)(Arguments...)) {
    return sizeof...(Arguments);
}

}  // namespace shim
