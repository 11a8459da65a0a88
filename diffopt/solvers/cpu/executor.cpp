// The C interface of the CPU executor: plain pointers in, plain pointers out, no exception crosses it.
//
// Every instance is solved on its own and by the same instructions wherever it stands in a batch, so its answer has the
// same bits in any batch. Small problems lie in the lanes of registers; a group that is not full is filled up with
// copies of its last problem, and where only a few are left they are solved alone, by the instructions of a lane.
#include <limits>

#include "certify.hpp"
#include "dual.hpp"
#include "many.hpp"
#include "pool.hpp"
#include "pullback.hpp"

#if defined(_WIN32)
#define DIFFOPT_API extern "C" __declspec(dllexport)
#else
#define DIFFOPT_API extern "C" __attribute__((visibility("default")))
#endif

namespace diffopt {
namespace {

// The memory of a thread for one shape of problems; kept from call to call, for new memory is slow memory.
template <class P> struct Workspace {
    Setup<P> setup;
    Dual<P> dual;
    Arena arena;
    Workspace(const Batch& batch, const Options& options) : setup(batch), dual(batch, options) {
        arena.lay_out([&](Arena& a) {
            setup.plan(a);
            dual.plan(a);
        });
    }
};

// `batch` and `options` of this thread's present call; a workspace refers to them.
template <class P> struct Local {
    Batch batch;
    Options options;
    Sizes key;
    std::unique_ptr<Workspace<P>> workspace;

    Workspace<P>& get(const Batch& b, const Options& o) {
        const Sizes wanted(b);
        batch = b;
        options = o;
        if (!workspace || !(wanted == key)) {
            workspace.reset();
            workspace = std::make_unique<Workspace<P>>(batch, options);
            key = wanted;
        }
        return *workspace;
    }
};

template <class T> void fill(void* target, Index from, Index to, Index size) {
    T* v = static_cast<T*>(target);
    for (Index i = from * size; i < to * size; i++) v[i] = std::numeric_limits<T>::quiet_NaN();
}

void clear_answer(const Batch& batch, const Answer& a, const Places& places, Index from, Index to) {
    PROFILE(CLEAR, 0);
    auto nan = [&](void* target, Index size) {
        if (batch.single) fill<float>(target, from, to, size);
        else fill<double>(target, from, to, size);
    };
    nan(a.x, batch.n);
    nan(a.s, batch.m);
    nan(a.lam, batch.m);
    nan(a.nu, batch.p);
    nan(a.lower, batch.n);
    nan(a.upper, batch.n);
    for (Index i = from; i < to; i++) {
        a.status[i] = UNSOLVED;
        a.iterations[i] = a.weak[i] = a.dependent[i] = 0;
        if (a.saved) *places.at(a, i) = NO_RECORD;
        for (int e = 0; e < 3; e++) a.residuals[e * batch.count + i] = std::numeric_limits<double>::quiet_NaN();
    }
}

// Roughly how many operations an instance takes, for deciding whether threads are worth waking.
double operations(const Batch& b) {
    const double n = static_cast<double>(b.n), c = static_cast<double>(b.m + b.bounds()), p = static_cast<double>(b.p);
    return n * n * n / 3 + n * n * (c + p) + n * (c + p) * (c + p) + 8 * (c * c * c / 3 + 8 * c * c + 60 * c) + 2000;
}
constexpr Index ALONE_UP_TO = 3;
constexpr double WORTH_WAKING = 1e6, CHUNK = 2e5;

template <class P> int64_t solve_batch(const Batch& batch, const Options& options, const Answer& answer, Index begin, Index end) {
    const Index group = P::S, groups = (end - begin + group - 1) / group;
    const double each = operations(batch) * static_cast<double>(group);
    const Index per_chunk = std::max<Index>(1, static_cast<Index>(CHUNK / each));
    const Index chunks = (groups + per_chunk - 1) / per_chunk;
    const int64_t threads = each * static_cast<double>(groups) < WORTH_WAKING ? 1 : options.threads;
    static thread_local Local<P> local;
    const Setup<P>* common = nullptr;
    if (matrices_shared(batch)) {
        Setup<P>& setup = local.get(batch, options).setup;
        setup.build(batch, begin);
        common = &setup;
        if (answer.saved_shared) {
            if constexpr (P::LANES) {
                const Small<P> record(batch, answer, begin);
                std::copy_n(setup.U, batch.n * batch.n * P::S, record.U);
                std::copy_n(setup.V, batch.n * record.joint * P::S, record.V);
            } else {
                keep_factor(setup.U, setup.k.np, batch.n, Saved(batch, answer, begin).U);
            }
        }
    }
    std::atomic<int64_t> missing{0};
    std::atomic<bool> failed{false};
    Pool::run(chunks, threads, [&](int64_t chunk) {
        try {
            static thread_local Local<P> mine;
            Workspace<P>& w = common ? mine.get(batch, options) : local.get(batch, options);
            const Index last = std::min<Index>(groups, (chunk + 1) * per_chunk);
            for (Index q = chunk * per_chunk; q < last; q++) {
                const Index first = begin + q * group;
                if (!common) w.setup.build(batch, first);
                missing += w.dual.run(common ? *common : w.setup, first, answer);
            }
        } catch (...) {
            failed = true;
        }
    });
    return failed ? -1 : missing.load();
}

// Whether the dual form is tried first.
bool takes_dual(const Batch& batch, const Options& options) {
    return batch.hessian == DENSE && static_cast<double>(batch.m + batch.bounds()) <= 1.9 * static_cast<double>(batch.n) &&
           options.polish && (options.reduction == REDUCE_AUTO || options.reduction == REDUCE_DUAL);
}

// Where records lie, and which problems are solved in lanes. Filling all lanes for one or two problems takes longer than
// solving these on their own, by the instructions of a lane; same bits.
Places places_of(const Batch& batch, const Options& options, Index begin, Index end) {
    const bool small = takes_dual(batch, options) && batch.n + batch.p <= options.lanes_up_to &&
                       batch.m + batch.bounds() <= options.lanes_up_to;
    const Index rest = (end - begin) % Lanes::W;
    return {small, begin, rest <= ALONE_UP_TO ? end - rest : end};
}

int64_t solve_by_dual(const Batch& batch, const Options& options, const Answer& answer, const Places& places, Index begin,
                      Index end) {
    if (!places.small) return solve_batch<Single>(batch, options, answer, begin, end);
    int64_t missing = 0;
    if (places.alone > begin) missing = solve_batch<Lanes>(batch, options, answer, begin, places.alone);
    if (missing < 0 || places.alone == end) return missing;
    const int64_t more = solve_batch<Alone>(batch, options, answer, places.alone, end);
    return more < 0 ? more : missing + more;
}

// The memory of a thread for the general method.
Whole& whole(const Batch& batch) {
    static thread_local std::unique_ptr<Whole> mine;
    static thread_local Sizes sizes;
    if (!mine || !(sizes == Sizes(batch))) {
        mine.reset();
        sizes = Sizes(batch);
        mine = std::make_unique<Whole>(sizes);
    }
    return *mine;
}

// What a solve returns beside how many instances are not SOLVED: which reductions were used.
constexpr int64_t BY_DUAL = int64_t{1} << 40, BY_DIAGONAL = int64_t{2} << 40, BY_PRIMAL = int64_t{4} << 40;

// Solves what is still UNSOLVED among [begin, end) by the general method; returns how many are not SOLVED, or -1.
int64_t solve_rest(const Batch& batch, const Options& options, const Answer& answer, const Places& places, Index begin,
                   Index end) {
    std::vector<Index> rest;
    for (Index i = begin; i < end; i++)
        if (answer.status[i] == UNSOLVED) rest.push_back(i);
    const double each = 4 * operations(batch);
    const Index count = static_cast<Index>(rest.size()), per_chunk = std::max<Index>(1, static_cast<Index>(CHUNK / each));
    const int64_t threads = each * static_cast<double>(count) < WORTH_WAKING ? 1 : options.threads;
    std::atomic<int64_t> missing{0}, used{0};
    std::atomic<bool> failed{false};
    Pool::run((count + per_chunk - 1) / per_chunk, threads, [&](int64_t chunk) {
        try {
            Whole& mine = whole(batch);
            const Index last = std::min<Index>(count, (chunk + 1) * per_chunk);
            for (Index c = chunk * per_chunk; c < last; c++) {
                PROFILE(GENERAL, 0);
                const Index i = rest[static_cast<std::size_t>(c)];
                mine.run(batch, options, places, i, answer, nullptr);
                missing += answer.status[i] != SOLVED;
                used |= mine.diagonal() ? BY_DIAGONAL : BY_PRIMAL;
            }
        } catch (...) {
            failed = true;
        }
    });
    return failed ? -1 : missing.load() | used.load();
}

}  // namespace
}  // namespace diffopt

using namespace diffopt;

DIFFOPT_API int32_t diffopt_abi() { return 7; }

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

// What a call is about; all fields are 8 bytes wide, so the other side writes it as one array of numbers.
struct Call {
    Batch batch;
    Answer answer;
    Options options;
};

// How many numbers a solve keeps for its pullback: of each instance, and once for all.
DIFFOPT_API int64_t diffopt_saved_size(const Call* call, int64_t once) {
    const Batch& batch = call->batch;
    const Options& options = call->options;
    const int64_t sides = Saved::round(Sides::size(batch));
    if (!takes_dual(batch, options)) return once ? 0 : sides;
    if (!places_of(batch, options, 0, 0).small) return once ? Saved::shared_size(batch) : std::max(Saved::size(batch), sides);
    const int64_t each = std::max<int64_t>(Saved::round(Small<Lanes>::size(batch)), sides);
    return once ? (W - 1) * each + Small<Lanes>::shared_size(batch) : each;
}

// Solves instances [begin, end). Returns how many are not SOLVED, plus 2^40 (by the dual form), 2^41 (with a diagonal
// Hessian eliminated first) and 2^42 (n x n) for the ways in which some were; or -1 if memory ran out.
DIFFOPT_API int64_t diffopt_solve(const Call* call, int64_t begin, int64_t end) {
    PROFILE(CALL, 0);
    const Batch& batch = call->batch;
    const Options& options = call->options;
    const Answer& answer = call->answer;
    try {
        const Places places = places_of(batch, options, begin, end);
        if (answer.saved)
            prefer_large_pages(answer.saved + begin * answer.saved_stride,
                               static_cast<std::size_t>((end - begin) * answer.saved_stride) * sizeof(double));
        clear_answer(batch, answer, places, begin, end);
        if (takes_dual(batch, options)) {
            const int64_t missing = solve_by_dual(batch, options, answer, places, begin, end);
            if (missing <= 0) return missing < 0 ? missing : BY_DUAL;
            const bool some = std::any_of(answer.status + begin, answer.status + end, [](int8_t s) { return s != UNSOLVED; });
            const int64_t rest = solve_rest(batch, options, answer, places, begin, end);
            if (rest < 0) return rest;
            const auto unsolved = std::count_if(answer.status + begin, answer.status + end, [](int8_t s) { return s != SOLVED; });
            return unsolved | (rest & (BY_DIAGONAL | BY_PRIMAL)) | (some ? BY_DUAL : 0);
        }
        return solve_rest(batch, options, answer, places, begin, end);
    } catch (...) {
        return -1;
    }
}

// Writes the certificate of instance i, which ended as infeasible: x, nu, lam, lam_lower, lam_upper, one after the other,
// NaN where it says nothing. The instance is solved once more, for certificates are rare. Returns 0, 1 if it has none,
// or -1 if memory ran out.
DIFFOPT_API int64_t diffopt_certificate(const Call* call, int64_t i, double* target) {
    try {
        Ray ray;
        Answer answer = call->answer;
        answer.saved = nullptr;
        // An earlier solution proves nothing; the steps that it has cost stay counted.
        Batch batch = call->batch;
        batch.start = {};
        const int64_t steps = answer.iterations[i];
        whole(batch).run(batch, call->options, Places{}, i, answer, &ray);
        answer.iterations[i] = steps;
        std::copy(ray.begin(), ray.end(), target);
        return ray.empty();
    } catch (...) {
        return -1;
    }
}

namespace diffopt {
namespace {

// Instances [first, last) of those up to `end` that this thread has.
template <class P, class T> void pull_group(const Call& call, const Places& places, const Gradients& g, Index first, Index last,
                                            Index end, PullbackWork& work) {
    if (places.small) return pull_lanes<P, T>(call.batch, call.answer, places, g, first, last, work);
    for (Index i = first; i < last; i++) pull_back<T>(call.batch, call.answer, places, g, i, std::min(i + 1, end - 1), work);
}

}  // namespace
}  // namespace diffopt

// Writes the gradients of instances [begin, end), which must have been solved by one call; returns how many of them are not
// to be relied on, or -1 if memory ran out.
DIFFOPT_API int64_t diffopt_pullback(const Call* call, const Gradients* gradients, int64_t threads, int64_t begin,
                                     int64_t end) {
    PROFILE(PULL_CALL, 0);
    const Batch& batch = call->batch;
    const Places places = places_of(batch, call->options, begin, end);
    const Index group = places.small ? W : 1;
    auto soon_written = [&](void* gradients_of, Index size) {
        const std::size_t bytes = static_cast<std::size_t>(size) * (batch.single ? sizeof(float) : sizeof(double));
        if (gradients_of)
            prefer_large_pages(static_cast<char*>(gradients_of) + static_cast<std::size_t>(begin) * bytes,
                               static_cast<std::size_t>(end - begin) * bytes);
    };
    if (batch.hessian == DENSE) soon_written(gradients->dQ, batch.n * batch.n);
    soon_written(gradients->dA, batch.p * batch.n);
    soon_written(gradients->dG, batch.m * batch.n);
    const double n = static_cast<double>(batch.n), each = (8 * n * n + 4 * n * static_cast<double>(batch.m) + 200) * static_cast<double>(group);
    const Index per_chunk = std::max<Index>(1, static_cast<Index>(CHUNK / each)) * group;
    const Index chunks = (end - begin + per_chunk - 1) / per_chunk;
    // (It waits for memory more than it computes.)
    if (8 * each * static_cast<double>((end - begin) / group) < WORTH_WAKING) threads = 1;
    std::atomic<int64_t> poor{0};
    std::atomic<bool> failed{false};
    Pool::run(chunks, threads, [&](int64_t chunk) {
        try {
            static thread_local PullbackWork work;
            work.poor = 0;
            const Index last = std::min<Index>(end, begin + (chunk + 1) * per_chunk);
            for (Index i = begin + chunk * per_chunk; i < last;) {
                const bool lanes = places.grouped(i);
                const Index next = lanes ? std::min<Index>(i + W, last) : i + 1;
                if (lanes && batch.single) pull_group<Lanes, float>(*call, places, *gradients, i, next, last, work);
                else if (lanes) pull_group<Lanes, double>(*call, places, *gradients, i, next, last, work);
                else if (batch.single) pull_group<Alone, float>(*call, places, *gradients, i, next, last, work);
                else pull_group<Alone, double>(*call, places, *gradients, i, next, last, work);
                i = next;
            }
            poor += work.poor;
        } catch (...) {
            failed = true;
        }
    });
    return failed ? -1 : poor.load();
}

// Applies the derivative of instances [begin, end), which must have been solved by one call, to many vectors of each; see
// many.hpp. Returns as above.
DIFFOPT_API int64_t diffopt_many(const Call* call, const Gradients* gradients, const Many* many, int64_t threads,
                                 int64_t begin, int64_t end) {
    const Batch& batch = call->batch;
    const Places places = places_of(batch, call->options, begin, end);
    // One instance's vectors are shared out only where there are threads without an instance.
    const Index instances = end - begin, panel = WIDEST * W;
    const Index pieces = instances >= threads ? 1 : std::min<Index>(threads, (many->count + panel - 1) / panel);
    const Index each = pieces == 0 ? 0 : (many->count + pieces * panel - 1) / (pieces * panel) * panel;
    const double n = static_cast<double>(batch.n), vectors = static_cast<double>(many->count * instances);
    if (8 * n * n * vectors < WORTH_WAKING) threads = 1;
    std::vector<std::atomic<bool>> poor(static_cast<std::size_t>(instances));
    std::atomic<bool> failed{false};
    Pool::run(instances * pieces, threads, [&](int64_t chunk) {
        try {
            static thread_local PullbackWork work;
            const Index i = begin + chunk / pieces, from = chunk % pieces * each, to = std::min<Index>(many->count, from + each);
            if (from >= to) return;
            work.poor = 0;
            if (batch.single) pull_many<float>(batch, call->answer, places, *gradients, *many, i, from, to, work);
            else pull_many<double>(batch, call->answer, places, *gradients, *many, i, from, to, work);
            if (work.poor) poor[static_cast<std::size_t>(i - begin)] = true;
        } catch (...) {
            failed = true;
        }
    });
    return failed ? -1 : std::count(poor.begin(), poor.end(), true);
}
