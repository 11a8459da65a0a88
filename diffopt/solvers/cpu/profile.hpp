// Where the time of a call goes: counters that exist only where DIFFOPT_PROFILE is defined (`make bench-profile`).
//
//   PROFILE(PHASE, flops[, bytes])       this phase until the end of the scope, then again the one around it
//   PROFILE_THEN(PHASE, flops[, bytes])  another phase from here on, until the end of the PROFILE around it
//
// Flops and bytes are those of the problems in all lanes, by the usual counts, padding left out; 0 where none are counted.
// In the ordinary library nothing is left of either, nor of their arguments.
#pragma once

#if !defined(DIFFOPT_PROFILE)

#define PROFILE(...)
#define PROFILE_THEN(...)

#else

#include <chrono>
#include <mutex>
#include <vector>

#include "simd.hpp"

// The phases in the order of the report, and how a reader is told what they are: "group: part". All from PULL_CALL on
// belong to the reverse pass.
#define DIFFOPT_PHASES(X)                                      \
    X(OUTSIDE, "outside")                                      \
    X(CALL, "elsewhere in the call")                           \
    X(CLEAR, "answer: clearing it")                            \
    X(READ, "data: reading the matrices")                      \
    X(EQUILIBRATE, "data: equilibration")                      \
    X(VECTORS, "data: reading the vectors")                    \
    X(FACTOR_Q, "set-up: factor of Q")                         \
    X(ROWS, "set-up: the factor applied to A and G")           \
    X(REDUCE, "set-up: G Q^-1 G'")                             \
    X(EQUALITIES, "set-up: eliminating equalities, copying")        \
    X(START, "set-up: starting point")                         \
    X(PRODUCT, "iterations: products with the reduced matrix") \
    X(FORM, "iterations: forming the system")                  \
    X(FACTOR, "iterations: factorising it")                    \
    X(SOLVES, "iterations: triangular solves")                 \
    X(STEP, "iterations: step lengths and vectors")            \
    X(POLISH, "polish: choosing the active rows")              \
    X(HOLD, "polish: forming the system")                      \
    X(HOLD_FACTOR, "polish: factorising it")                   \
    X(POLISH_SOLVES, "polish: triangular solves and products") \
    X(CHECK, "residual check: products with the data")         \
    X(CHECK_MAXIMA, "residual check: maxima")                  \
    X(WRITE, "answer: writing it")                             \
    X(RECORD, "answer: writing the record")                    \
    X(GENERAL, "general method")                               \
    X(PULL_CALL, "elsewhere in the pullback")                  \
    X(PULL_IN, "incoming gradients")                           \
    X(ADJOINT, "adjoint solve")                                \
    X(PULL_OUT, "writing dq, db, dh")                          \
    X(PULL_DQ, "writing dQ")                                   \
    X(PULL_DA, "writing dA")                                   \
    X(PULL_DG, "writing dG")

namespace diffopt {

#define DIFFOPT_PHASE(name, text) name,
enum class Phase : int { DIFFOPT_PHASES(DIFFOPT_PHASE) PHASES };
#undef DIFFOPT_PHASE
constexpr int PHASES = static_cast<int>(Phase::PHASES);

inline int64_t ticks() {
#if defined(__x86_64__)
    return static_cast<int64_t>(__builtin_ia32_rdtsc());
#else
    return std::chrono::steady_clock::now().time_since_epoch().count();
#endif
}

// The counters of a thread.
struct Counters {
    struct Row {
        int64_t ticks, times;
        double flops, bytes;
    };
    Row rows[PHASES] = {};
    Phase now = Phase::OUTSIDE;
    int64_t since = ticks();

    void go(Phase phase, double flops, double bytes) {
        const int64_t here = ticks();
        Row& before = rows[static_cast<int>(now)];
        before.ticks += here - since;
        before.times++;
        Row& next = rows[static_cast<int>(phase)];
        next.flops += flops;
        next.bytes += bytes;
        now = phase;
        since = here;
    }

    // Those of all threads; never freed, for a thread may end before they are read.
    static std::vector<Counters*>& all() {
        static std::vector<Counters*> found;
        return found;
    }
    static std::mutex& guard() {
        static std::mutex mutex;
        return mutex;
    }
    static Counters& mine() {
        static thread_local Counters* const counters = [] {
            std::lock_guard<std::mutex> lock(guard());
            all().push_back(new Counters);
            return all().back();
        }();
        return *counters;
    }
};

class Profiled {
  public:
    Profiled(Phase phase, double flops, double bytes = 0) : counters_(Counters::mine()), before_(counters_.now) {
        counters_.go(phase, flops, bytes);
    }
    Profiled(const Profiled&) = delete;
    Profiled& operator=(const Profiled&) = delete;
    ~Profiled() { counters_.go(before_, 0, 0); }
    static void then(Phase phase, double flops, double bytes = 0) { Counters::mine().go(phase, flops, bytes); }

  private:
    Counters& counters_;
    Phase before_;
};

#define DIFFOPT_JOIN_(a, b) a##b
#define DIFFOPT_JOIN(a, b) DIFFOPT_JOIN_(a, b)
#define PROFILE(phase, ...) const ::diffopt::Profiled DIFFOPT_JOIN(profiled_, __LINE__)(::diffopt::Phase::phase, __VA_ARGS__)
#define PROFILE_THEN(phase, ...) ::diffopt::Profiled::then(::diffopt::Phase::phase, __VA_ARGS__)

// Counts of operations, written at the markers.
inline double square(Index n) { return static_cast<double>(n) * static_cast<double>(n); }
inline double cube(Index n) { return square(n) * static_cast<double>(n); }
inline double product(Index rows, Index columns) { return static_cast<double>(rows) * static_cast<double>(columns); }

// Seconds of a tick, and of a change of phase: the timer's own share of every phase, `times` of it.
struct Timer {
    double tick, change;
    Timer() {
        using Clock = std::chrono::steady_clock;
        const auto from = Clock::now();
        const int64_t first = ticks();
        while (Clock::now() - from < std::chrono::milliseconds(20)) {}
        tick = std::chrono::duration<double>(Clock::now() - from).count() / static_cast<double>(ticks() - first);
        constexpr int many = 20000;
        Counters counters;
        int64_t least = INT64_MAX;
        for (int repeat = 0; repeat < 10; repeat++) {
            const int64_t begin = ticks();
            for (int i = 0; i < many; i++) counters.go(i % 2 ? Phase::STEP : Phase::FORM, 1, 0);
            least = std::min(least, ticks() - begin);
        }
        change = tick * static_cast<double>(least) / many;
    }
};

}  // namespace diffopt

// Writes what has been counted in a phase, in all threads, since it was last asked for: seconds, how often it was left,
// flops and bytes; and the seconds that the timer itself takes each time. Returns its name, or null if there are no more.
extern "C" __attribute__((visibility("default"))) const char* diffopt_profile(int64_t phase, double* found) {
#define DIFFOPT_NAME(name, text) text,
    static const char* const names[] = {DIFFOPT_PHASES(DIFFOPT_NAME)};
#undef DIFFOPT_NAME
    using namespace diffopt;
    static const Timer timer;
    if (phase < 0 || phase >= PHASES) return nullptr;
    std::lock_guard<std::mutex> lock(Counters::guard());
    std::fill_n(found, 4, 0.0);
    for (Counters* counters : Counters::all()) {
        Counters::Row& row = counters->rows[phase];
        found[0] += static_cast<double>(row.ticks) * timer.tick;
        found[1] += static_cast<double>(row.times);
        found[2] += row.flops;
        found[3] += row.bytes;
        row = {};
    }
    found[4] = timer.change;
    return names[phase];
}

#endif
