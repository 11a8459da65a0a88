// A batch of quadratic programs as it comes through the C interface, and memory to work in.
#pragma once
#include <cstdlib>
#include <limits>
#include <memory>
#include <new>
#include <vector>

#include "profile.hpp"
#include "simd.hpp"

#if defined(__linux__)
#include <sys/mman.h>
#endif

namespace diffopt {

// Asks for large pages for memory that is about to be written: touching new memory page by page, and reading it back
// through many small ones, costs more than the arithmetic on large problems.
inline void prefer_large_pages(const void* memory, std::size_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
    constexpr std::size_t large = std::size_t{1} << 21;
    const std::size_t from = (reinterpret_cast<std::size_t>(memory) + large - 1) / large * large;
    const std::size_t to = (reinterpret_cast<std::size_t>(memory) + bytes) / large * large;
    if (memory && to > from) madvise(reinterpret_cast<void*>(from), to - from, MADV_HUGEPAGE);
#else
    (void)memory, (void)bytes;
#endif
}

enum Field { FIELD_Q, FIELD_FACTOR, FIELD_q, FIELD_A, FIELD_b, FIELD_G, FIELD_h, FIELD_LOWER, FIELD_UPPER, FIELDS };
enum HessianKind : int64_t { DENSE, DIAGONAL, DIAGONAL_PLUS_LOW_RANK };

// An earlier solution from which to begin: arrays over the batch, contiguous, of the data's type; null if there is none.
// An instance with NaN or infinity in it begins without.
struct Start {
    const void *x, *nu, *lam, *lower, *upper;
    bool given() const { return x != nullptr; }
};

// Every field is 8 bytes wide, so that the other side can write it as one array of numbers.
struct Batch {
    int64_t count, n, p, m, rank;  // rank: columns of the low-rank factor of Q
    int64_t hessian, single;       // a HessianKind; whether the data is float32
    const void* data[FIELDS];      // null where absent
    int64_t stride[FIELDS];        // numbers from one instance to the next; 0: shared by all
    Start start;

    bool has(Field f) const { return data[f] != nullptr; }
    bool bounded() const { return has(FIELD_LOWER) || has(FIELD_UPPER); }
    Index bounds() const { return bounded() ? n : 0; }
    bool shared(Field f) const { return stride[f] == 0; }
    template <class T> const T* at(Field f, Index instance) const {
        return static_cast<const T*>(data[f]) + instance * stride[f];
    }
};

enum Reduction : int64_t { REDUCE_AUTO, REDUCE_DUAL, REDUCE_DIAGONAL, REDUCE_PRIMAL };

struct Options {
    double tolerance, weak_tolerance;
    double claim, almost;  // residuals of the answer, as written, up to which an instance is SOLVED or ALMOST_SOLVED
    int64_t max_iterations, reduction, polish, keep, threads, lanes_up_to;
};

// Where answers go: arrays over the batch, contiguous; null where not wanted.
struct Answer {
    void *x, *s, *lam, *nu, *lower, *upper;  // of the data's type
    int8_t* status;
    int64_t *iterations, *weak, *dependent;
    double* residuals;                // primal of all instances, then dual, then gap
    double *saved, *saved_shared;     // for the pullback; null if nothing is kept
    int64_t saved_stride;             // numbers of each instance in `saved`
};

// The numbers of diffopt.Status.
enum Status : int8_t {
    UNSOLVED, SOLVED, ALMOST_SOLVED, MAX_ITERATIONS, PRIMAL_INFEASIBLE, DUAL_INFEASIBLE, NUMERICAL_ERROR, NONFINITE_INPUT
};

// What may be said of a point with this residual.
inline int8_t graded(const Options& options, double residual) {
    return residual <= options.claim ? SOLVED : residual <= options.almost ? ALMOST_SOLVED : NUMERICAL_ERROR;
}

// A block of memory, aligned to registers, from which a thread takes arrays one after the other.
class Arena {
  public:
    Arena() = default;
    Arena(const Arena&) = delete;
    Arena& operator=(const Arena&) = delete;
    ~Arena() { std::free(memory_); }
    // Takes room for `count` numbers, zeroed; with no memory reserved it only counts.
    double* take(Index count) {
        count = (count + 7) / 8 * 8;
        double* p = memory_ ? memory_ + used_ : nullptr;
        used_ += count;
        return p;
    }
    void reserve() {
        std::free(memory_);
        memory_ = nullptr;
        const std::size_t bytes = static_cast<std::size_t>(used_ + 8) * sizeof(double);
        memory_ = static_cast<double*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64));
        if (!memory_) throw std::bad_alloc();
        std::memset(memory_, 0, bytes);
        used_ = 0;
    }
    // Lays out an object: `plan(arena)` takes its arrays, once to count and once for good.
    template <class Plan> void lay_out(const Plan& plan) {
        std::free(memory_);
        memory_ = nullptr;
        used_ = 0;
        plan(*this);
        reserve();
        plan(*this);
    }

  private:
    double* memory_ = nullptr;
    Index used_ = 0;
};

}  // namespace diffopt
