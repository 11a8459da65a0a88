// Exercises the CPU executor through its C interface, for sanitizers: `make sanitize` compiles and runs this.
//
// Random problems of all kinds and layouts are solved, checked against the optimality conditions, and differentiated
// along a random direction, which is compared with central differences. Arrays have exactly the size that they need,
// and are full of NaN before, so that what is read without having been written shows. Exits with 1 on any error.
#include "../../../diffopt/solvers/cpu/executor.cpp"

#include <cstdio>
#include <random>
#include <string>

namespace {

std::atomic<int> errors{0};

struct Kind {
    Index n, p, m;
    bool lower, upper;
    Index rank = -1;  // of the low-rank part of Q, -1 if Q is dense
    int64_t reduction = REDUCE_AUTO;
    bool polish = true;
    std::string text() const {
        return "n=" + std::to_string(n) + " p=" + std::to_string(p) + " m=" + std::to_string(m) + " bounds=" +
               std::to_string(lower) + std::to_string(upper) + " rank=" + std::to_string(rank) +
               " reduction=" + std::to_string(reduction) + " polish=" + std::to_string(polish);
    }
};

enum Sharing { NONE, MATRICES, ONLY_Q, ALL_BUT_q };
enum Fault { FINE, NAN_q, INFINITE_Q, CROSSED, IMPOSSIBLE, CONTRADICTORY, INDEFINITE };

constexpr double NOTHING = std::numeric_limits<double>::quiet_NaN();

class Random {
  public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    double normal() { return normal_(engine_); }
    double uniform() { return uniform_(engine_); }

  private:
    std::mt19937_64 engine_;
    std::normal_distribution<double> normal_;
    std::uniform_real_distribution<double> uniform_;
};

// A batch with its answers, records and gradients.
template <class T> struct Work {
    Kind sizes;
    Index count;
    std::vector<T> data[FIELDS];
    std::vector<Fault> faults;
    std::vector<T> x, s, lam, nu, low, up;
    std::vector<int8_t> status;
    std::vector<int64_t> iterations, weak, dependent;
    std::vector<double> residuals, saved;
    std::vector<T> gx, gs, glam, gnu, glow, gup;                // incoming
    std::vector<T> dQ, dF, dq, dA, db, dG, dh, dlow, dup;           // outgoing
    Call call{};
    int64_t missing = 0;

    Index core(int field) const {
        const Index n = sizes.n, p = sizes.p, m = sizes.m;
        const Index all[FIELDS] = {sizes.rank < 0 ? n * n : n, std::max<Index>(sizes.rank, 0) * n, n, p * n, p, m * n, m, sizes.lower ? n : 0, sizes.upper ? n : 0};
        return all[field];
    }
    const T* at(int field, Index i) const { return data[field].data() + i * call.batch.stride[field]; }
    T* at(int field, Index i) { return data[field].data() + i * call.batch.stride[field]; }

    Work(Kind sizes, Index count, Sharing sharing, bool faulty, uint64_t seed) : sizes(sizes), count(count) {
        Random random(seed);
        const Index n = sizes.n, p = sizes.p, m = sizes.m;
        Batch& batch = call.batch;
        const int64_t hessian = sizes.rank < 0 ? DENSE : sizes.rank == 0 ? DIAGONAL : DIAGONAL_PLUS_LOW_RANK;
        batch = {count, n, p, m, std::max<Index>(sizes.rank, 0), hessian, std::is_same<T, float>::value, {}, {}, {}};
        for (int f = 0; f < FIELDS; f++) {
            const bool matrix = f == FIELD_Q || f == FIELD_FACTOR || f == FIELD_A || f == FIELD_G;
            bool is_shared = false;
            if (sharing == MATRICES) is_shared = matrix;
            if (sharing == ONLY_Q) is_shared = f == FIELD_Q || f == FIELD_FACTOR;
            if (sharing == ALL_BUT_q) is_shared = f != FIELD_q;
            batch.stride[f] = is_shared ? 0 : core(f);
            data[f].resize(core(f) * (is_shared ? 1 : count));
        }
        faults.assign(count, FINE);
        std::vector<double> point(n), root(n * n);
        for (Index i = 0; i < count; i++) {
            auto fresh = [&](int f) { return i == 0 || batch.stride[f] != 0; };
            if (i == 0 || sharing != ALL_BUT_q)
                for (auto& v : point) v = random.normal();
            if (fresh(FIELD_Q) && sizes.rank >= 0)
                for (Index r = 0; r < n; r++) at(FIELD_Q, i)[r] = T(0.1 + random.uniform());
            if (fresh(FIELD_FACTOR))
                for (Index r = 0; r < sizes.rank * n; r++) at(FIELD_FACTOR, i)[r] = T(random.normal());
            if (fresh(FIELD_Q) && sizes.rank < 0) {
                for (auto& v : root) v = random.normal();
                for (Index r = 0; r < n; r++)
                    for (Index c = 0; c < n; c++) {
                        double sum = r == c ? 0.1 : 0.01 * (r < c) - 0.01 * (r > c);  // not symmetric
                        for (Index k = 0; k < n; k++) sum += root[r * n + k] * root[c * n + k] / double(n);
                        at(FIELD_Q, i)[r * n + c] = T(sum);
                    }
            }
            for (Index r = 0; r < n; r++) at(FIELD_q, i)[r] = T(3 * random.normal());
            auto rows = [&](int matrix, int side, Index size, bool slack) {
                if (fresh(matrix))
                    for (Index r = 0; r < size * n; r++) at(matrix, i)[r] = T(random.normal());
                if (!fresh(side)) return;
                for (Index r = 0; r < size; r++) {
                    double sum = slack ? random.uniform() : 0;
                    for (Index c = 0; c < n; c++) sum += double(at(matrix, i)[r * n + c]) * point[c];
                    at(side, i)[r] = T(slack && random.uniform() < 0.1 ? INF : sum);
                }
            };
            rows(FIELD_A, FIELD_b, p, false);
            rows(FIELD_G, FIELD_h, m, true);
            for (Index r = 0; r < n; r++) {
                const double away = random.uniform(), low_away = random.uniform() < 0.3 ? INF : away;
                if (sizes.lower && fresh(FIELD_LOWER)) at(FIELD_LOWER, i)[r] = T(point[r] - low_away);
                if (sizes.upper && fresh(FIELD_UPPER)) at(FIELD_UPPER, i)[r] = T(point[r] + 0.1 + random.uniform());
            }
            if (faulty && i % 3 == 1) spoil(i);
        }
        auto output = [&](std::vector<T>& v, Index size) { v.assign(size * count, T(NOTHING)); };
        output(x, n), output(s, m), output(lam, m), output(nu, p), output(low, n), output(up, n);
        output(dQ, core(FIELD_Q)), output(dF, core(FIELD_FACTOR)), output(dq, n), output(dA, p * n), output(db, p), output(dG, m * n), output(dh, m);
        output(dlow, n), output(dup, n);
        auto input = [&](std::vector<T>& v, Index size) {
            output(v, size);
            for (auto& entry : v) entry = T(random.normal());
        };
        input(gx, n), input(gs, m), input(glam, m), input(gnu, p), input(glow, n), input(gup, n);
        const std::size_t many = count;
        status.assign(many, 77);
        iterations.assign(many, -7), weak.assign(many, -7), dependent.assign(many, -7);
        residuals.assign(3 * many, NOTHING);
    }

    // Breaks instance i, in what is its own.
    void spoil(Index i) {
        const Batch& batch = call.batch;
        const Index n = sizes.n;
        Fault fault = static_cast<Fault>(1 + (i / 3) % 6);
        if ((fault == INFINITE_Q || fault == INDEFINITE) && !batch.stride[FIELD_Q]) fault = NAN_q;
        if (fault == CROSSED && !(sizes.lower && sizes.upper && batch.stride[FIELD_LOWER])) fault = NAN_q;
        if (fault == IMPOSSIBLE && !(sizes.m && batch.stride[FIELD_h])) fault = NAN_q;
        if (fault == CONTRADICTORY && !(sizes.m > 1 && batch.stride[FIELD_G] && batch.stride[FIELD_h])) fault = NAN_q;
        faults[i] = fault;
        if (fault == NAN_q) at(FIELD_q, i)[n - 1] = T(NOTHING);
        if (fault == INFINITE_Q) at(FIELD_Q, i)[0] = T(INF);
        if (fault == INDEFINITE)
            for (Index r = 0; r < core(FIELD_Q); r++) at(FIELD_Q, i)[r] = -at(FIELD_Q, i)[r] - T(sizes.rank > 0 ? 100 : 0);
        if (fault == CROSSED) at(FIELD_LOWER, i)[0] = 1, at(FIELD_UPPER, i)[0] = -1;
        if (fault == IMPOSSIBLE) at(FIELD_h, i)[0] = T(-INF);
        if (fault == CONTRADICTORY) {
            for (Index c = 0; c < n; c++) at(FIELD_G, i)[n + c] = -at(FIELD_G, i)[c];
            at(FIELD_h, i)[0] = at(FIELD_h, i)[1] = -1;
        }
    }

    // In two calls, of which the second begins at `split`: a multiple of any register's width, as Python's slices are.
    void solve(int64_t threads, bool keep, Index split) {
        Batch& batch = call.batch;
        for (int f = 0; f < FIELDS; f++) batch.data[f] = core(f) ? data[f].data() : nullptr;
        const bool wide = sizeof(T) == 8;
        call.options = {wide ? 1e-9 : 1e-8, wide ? 1e-7 : 1e-3, wide ? 1e-9 : 1e-5, 1e-5, 60, sizes.reduction, sizes.polish, keep, threads, 32};
        const int64_t size = keep ? diffopt_saved_size(&call, 0) : 0, once = keep ? diffopt_saved_size(&call, 1) : 0;
        saved.assign(size * count + once, NOTHING);  // (what is kept once comes right behind)
        call.answer = {x.data(), s.data(), lam.data(), nu.data(), low.data(), up.data(),
                       status.data(), iterations.data(), weak.data(), dependent.data(), residuals.data(),
                       keep ? saved.data() : nullptr, once ? saved.data() + size * count : nullptr, size};
        const int64_t counted = (int64_t{1} << 40) - 1;
        missing = diffopt_solve(&call, 0, split ? split : count) & counted;
        if (split && split < count) missing += diffopt_solve(&call, split, count) & counted;
    }

    int8_t expected(Index i) const {
        switch (faults[i]) {
            case FINE: return SOLVED;
            case CROSSED: case CONTRADICTORY: return PRIMAL_INFEASIBLE;
            case INDEFINITE: return NUMERICAL_ERROR;
            default: return NONFINITE_INPUT;
        }
    }

    // Certificates prove what they say.
    void check_certificates() const {
        const Index n = sizes.n, p = sizes.p, m = sizes.m;
        for (Index i = 0; i < count; i++) {
            if (status[i] != PRIMAL_INFEASIBLE) continue;
            std::vector<double> ray(3 * n + p + m, NOTHING);
            Work copy(*this);  // (the instance is solved once more, into other arrays)
            copy.call.answer = {copy.x.data(), copy.s.data(), copy.lam.data(), copy.nu.data(), copy.low.data(),
                                copy.up.data(), copy.status.data(), copy.iterations.data(), copy.weak.data(),
                                copy.dependent.data(), copy.residuals.data(), nullptr, nullptr, 0};
            for (int f = 0; f < FIELDS; f++) copy.call.batch.data[f] = core(f) ? copy.data[f].data() : nullptr;
            if (diffopt_certificate(&copy.call, i, ray.data()) != 0) fail("no certificate", i);
            const double *nu = ray.data() + n, *lam = nu + p, *lower = lam + m, *upper = lower + n;
            double depth = 0, worst = 0, least = 0;
            auto side = [&](double multiplier, const T* bound, Index r, double sign) {
                if (multiplier != 0) depth += sign * multiplier * double(bound[r]);
            };
            for (Index r = 0; r < p; r++) side(nu[r], at(FIELD_b, i), r, 1);
            for (Index r = 0; r < m; r++) side(lam[r], at(FIELD_h, i), r, 1), least = std::min(least, lam[r]);
            for (Index c = 0; c < n; c++) {
                double sum = upper[c] - lower[c];
                for (Index r = 0; r < p; r++) sum += nu[r] * double(at(FIELD_A, i)[r * n + c]);
                for (Index r = 0; r < m; r++) sum += lam[r] * double(at(FIELD_G, i)[r * n + c]);
                worst = std::max(worst, std::fabs(sum));
                if (!std::isfinite(sum)) worst = INF;
                if (sizes.lower) side(lower[c], at(FIELD_LOWER, i), c, -1);
                if (sizes.upper) side(upper[c], at(FIELD_UPPER, i), c, 1);
                least = std::min({least, lower[c], upper[c]});
            }
            if (!(worst <= 1e-6 && std::fabs(depth + 1) <= 1e-6 && least >= 0)) fail("a false certificate", i);
        }
    }

    void pull_back(int64_t threads, bool all) {
        Gradients g{gx.data(), gs.data(), glam.data(), gnu.data(), glow.data(), gup.data(),
                    nullptr, dq.data(), nullptr, db.data(), nullptr, dh.data(), nullptr, nullptr, nullptr};
        if (all) g.dQ = dQ.data(), g.dfactor = sizes.rank > 0 ? dF.data() : nullptr, g.dA = dA.data(), g.dG = dG.data(), g.dlower = dlow.data(), g.dupper = dup.data();
        if (diffopt_pullback(&call, &g, threads, 0, count) != 0) fail("a pullback failed", 0);
    }

    // The same by many vectors at once, nine of them alike and two of zeros, and forward. After pull_back(.., true).
    void pull_many(int64_t threads) const {
        constexpr Index copies = 9, number = copies + 2;
        auto repeated = [&](const std::vector<T>& v) {
            std::vector<T> all;
            for (Index k = 0; k < copies; k++) all.insert(all.end(), v.begin(), v.end());
            all.resize(v.size() * number);
            return all;
        };
        auto empty = [&](const std::vector<T>& v) { return std::vector<T>(v.size() * number, T(NOTHING)); };
        const std::vector<T> x = repeated(gx), s = repeated(gs), l = repeated(glam), e = repeated(gnu), a = repeated(glow), b = repeated(gup);
        std::vector<T> to_q = empty(dq), to_b = empty(db), to_h = empty(dh), to_low = empty(dlow), to_up = empty(dup);
        Gradients g{x.data(), s.data(), l.data(), e.data(), a.data(), b.data(), nullptr, to_q.data(), nullptr,
                    to_b.data(), nullptr, to_h.data(), to_low.data(), to_up.data(), nullptr};
        Many many{number, count, 1, 0};
        if (diffopt_many(&call, &g, &many, threads, 0, count) != 0) fail("many pullbacks failed", 0);
        auto compare = [&](const std::vector<T>& found, const std::vector<T>& expected) {
            double largest = 0;
            for (const T v : expected) largest = std::isfinite(v) ? std::max(largest, std::fabs(double(v))) : largest;
            for (std::size_t j = 0; j < found.size(); j++) {
                const double wanted = j < copies * expected.size() ? double(expected[j % expected.size()]) : 0.0, v = double(found[j]);
                const bool same = std::isnan(wanted) ? std::isnan(v) : std::fabs(v - wanted) <= (sizeof(T) == 8 ? 1e-9 : 1e-3) * (1 + largest);
                if (!same) return fail("many pullbacks are not each alone", 0);
            }
        };
        compare(to_q, dq), compare(to_b, db), compare(to_h, dh);
        if (sizes.lower) compare(to_low, dlow);
        if (sizes.upper) compare(to_up, dup);
        many.forward = 1, g.s = nullptr;
        if (diffopt_many(&call, &g, &many, threads, 0, count) != 0) fail("a derivative failed", 0);
    }

    // The Jacobian of x, by unit vectors: the gradient of any function is a sum of its rows.
    void pull_columns(int64_t threads) const {
        const Index n = sizes.n, number = n + 1;
        std::vector<T> units(gx.size() * std::size_t(number)), rows(units.size()), alone(gx.size());
        std::vector<T> to_b(db.size() * std::size_t(number)), to_h(dh.size() * std::size_t(number));
        for (Index k = 0; k < n; k++)
            for (Index i = 0; i < count; i++) units[std::size_t((k * count + i) * n + k)] = 1;
        Gradients g{units.data(), nullptr, nullptr, nullptr, nullptr, nullptr, nullptr, rows.data(), nullptr,
                    to_b.data(), nullptr, to_h.data(), nullptr, nullptr, nullptr};
        Many many{number, count, 1, 0};
        if (diffopt_many(&call, &g, &many, threads, 0, count) != 0) fail("a Jacobian failed", 0);
        g.x = gx.data(), g.dq = alone.data(), many.count = 1;
        if (diffopt_many(&call, &g, &many, threads, 0, count) != 0) fail("a gradient failed", 0);
        for (Index i = 0; i < count; i++)
            for (Index j = 0; j < n; j++) {
                double sum = 0, size = 0;
                for (Index k = 0; k < n; k++) {
                    const double term = double(gx[std::size_t(i * n + k)]) * double(rows[std::size_t((k * count + i) * n + j)]);
                    sum += term, size += std::fabs(term);
                }
                const double wanted = double(alone[std::size_t(i * n + j)]);
                if (std::isnan(wanted) ? !std::isnan(sum) : std::fabs(sum - wanted) > (sizeof(T) == 8 ? 1e-9 : 1e-3) * (1 + size))
                    return fail("a gradient is not the sum of a Jacobian's rows", i);
            }
    }

    void fail(const char* what, Index i) const {
        if (errors++ < 20)
            std::fprintf(stderr, "%s: %s, instance %d of %d, %s, fault %d, status %d\n", what, sizes.text().c_str(),
                         int(i), int(count), sizeof(T) == 8 ? "double" : "float",
                         count ? int(faults[i]) : 0,
                         count ? int(status[i]) : 0);
    }

    // The sum of the incoming weights times the outputs of an instance: what is differentiated.
    double loss(const Work& weights, Index i) const {
        double sum = 0;
        auto add = [&](const std::vector<T>& w, const std::vector<T>& v, Index size) {
            for (Index r = i * size; r < (i + 1) * size; r++) {
                const double value = double(v[r]);
                if (std::isfinite(value)) sum += double(w[r]) * value;
            }
        };
        add(weights.gx, x, sizes.n), add(weights.glow, low, sizes.n), add(weights.gup, up, sizes.n);
        add(weights.gs, s, sizes.m), add(weights.glam, lam, sizes.m), add(weights.gnu, nu, sizes.p);
        return sum;
    }

    // Which inequalities have a multiplier.
    std::vector<bool> active(Index i) const {
        std::vector<bool> found;
        for (Index r = i * sizes.m; r < (i + 1) * sizes.m; r++) found.push_back(lam[r] > 0);
        for (Index r = i * sizes.n; r < (i + 1) * sizes.n; r++) {
            found.push_back(low[r] > 0);
            found.push_back(up[r] > 0);
        }
        return found;
    }

    void check() const {
        const Index n = sizes.n, p = sizes.p, m = sizes.m;
        const double tolerance = sizeof(T) == 8 ? 1e-8 : 2e-3;
        int64_t unsolved = 0;
        for (Index i = 0; i < count; i++) {
            const bool solved = status[i] == SOLVED;
            unsolved += !solved;
            if (status[i] != expected(i)) {
                fail("wrong status", i);
                continue;
            }
            if (!solved) continue;
            if (iterations[i] < 0 || iterations[i] > 60) fail("a wrong number of iterations", i);
            if (weak[i] < 0 || dependent[i] != 0) fail("wrong counts", i);
            for (int e = 0; e < 3; e++)
                if (!(residuals[e * count + i] <= call.options.claim)) fail("a large residual", i);
            auto value = [](const T* v, Index r) { return double(v[r]); };
            const T *px = x.data() + i * n, *ps = s.data() + i * m, *plam = lam.data() + i * m;
            const T *pnu = nu.data() + i * p, *plow = low.data() + i * n, *pup = up.data() + i * n;
            const T *Q = at(FIELD_Q, i), *A = at(FIELD_A, i), *G = at(FIELD_G, i);
            const T *q = at(FIELD_q, i), *b = at(FIELD_b, i), *h = at(FIELD_h, i);
            double worst = 0;
            auto expect_zero = [&](double v, double size) {
                worst = std::isfinite(v) ? std::max(worst, std::fabs(v) / (1 + size)) : INF;
            };
            for (Index r = 0; r < n; r++) {
                double slope = value(q, r) - value(plow, r) + value(pup, r), size = std::fabs(value(q, r));
                auto add = [&](double v) { slope += v, size = std::max(size, std::fabs(v)); };
                for (Index c = 0; c < n && sizes.rank < 0; c++)
                    add(0.5 * (value(Q, r * n + c) + value(Q, c * n + r)) * value(px, c));
                if (sizes.rank >= 0) add(value(Q, r) * value(px, r));
                for (Index k = 0; k < sizes.rank; k++) {
                    double along = 0;
                    for (Index c = 0; c < n; c++) along += value(at(FIELD_FACTOR, i), c * sizes.rank + k) * value(px, c);
                    add(value(at(FIELD_FACTOR, i), r * sizes.rank + k) * along);
                }
                for (Index c = 0; c < p; c++) add(value(A, c * n + r) * value(pnu, c));
                for (Index c = 0; c < m; c++) add(value(G, c * n + r) * value(plam, c));
                expect_zero(slope, size);
            }
            auto row = [&](const T* matrix, Index r) {
                double sum = 0;
                for (Index c = 0; c < n; c++) sum += value(matrix, r * n + c) * value(px, c);
                return sum;
            };
            for (Index r = 0; r < p; r++) expect_zero(row(A, r) - value(b, r), std::fabs(value(b, r)));
            auto inequality = [&](double slack, double multiplier) {
                expect_zero(std::min(slack, 0.0), 1);
                if (!(multiplier >= 0)) fail("a negative multiplier", i);
                if (multiplier != 0 && sizes.polish) expect_zero(slack, 1);  // the active set is solved for exactly
            };
            for (Index r = 0; r < m; r++) {
                inequality(value(h, r) - row(G, r), value(plam, r));
                if (value(h, r) < INF) expect_zero(value(h, r) - row(G, r) - value(ps, r), std::fabs(value(h, r)));
                else if (value(ps, r) != INF) fail("a slack that is not infinite", i);
            }
            for (Index r = 0; r < n; r++) {
                inequality(sizes.lower ? value(px, r) - value(at(FIELD_LOWER, i), r) : INF, value(plow, r));
                inequality(sizes.upper ? value(at(FIELD_UPPER, i), r) - value(px, r) : INF, value(pup, r));
            }
            if (!(worst <= tolerance)) fail("not optimal", i);
        }
        check_certificates();
        if (missing != unsolved) fail("a wrong number of unsolved problems", 0);
    }

    // Compares dq, db, dh (of solved instances; zero for others) with central differences along a random direction.
    void check_gradients(uint64_t seed) const {
        // What failed passes NaN to whoever asks, and everything was asked for.
        auto nothing = [](const std::vector<T>& v, Index size, Index i) {
            for (Index r = i * size; r < (i + 1) * size; r++)
                if (!std::isnan(v[r])) return false;
            return true;
        };
        const Index n = sizes.n, p = sizes.p, m = sizes.m;
        for (Index i = 0; i < count; i++) {
            const bool vectors = nothing(dq, n, i) && nothing(db, p, i) && nothing(dh, m, i);
            const bool bounds = nothing(dlow, n, i) && nothing(dup, n, i);
            const bool matrices = nothing(dQ, core(FIELD_Q), i) && nothing(dA, p * n, i) && nothing(dG, m * n, i);
            if (status[i] != SOLVED && !(vectors && bounds && matrices)) fail("a gradient of what was not solved", i);
        }
        // (Without a polish the points are not accurate enough to be subtracted.)
        if (sizeof(T) != 8 || !sizes.polish || (p && !call.batch.stride[FIELD_b]) || (m && !call.batch.stride[FIELD_h])) return;
        Random random(seed);
        constexpr double step = 1e-6;
        Work up_moved(*this), down_moved(*this);
        std::vector<double> expected(count);
        auto move = [&](int field, const std::vector<T>& gradient, Index size) {
            for (Index r = 0; r < size * count; r++) {
                const std::size_t entry = r;
                const double direction = random.normal();
                up_moved.data[field][entry] += T(step * direction);
                down_moved.data[field][entry] -= T(step * direction);
                expected[r / size] += direction * double(gradient[entry]);
            }
        };
        move(FIELD_q, dq, sizes.n), move(FIELD_b, db, sizes.p), move(FIELD_h, dh, sizes.m);
        up_moved.solve(1, false, count), down_moved.solve(1, false, count);
        for (Index i = 0; i < count; i++) {
            if (status[i] != SOLVED || active(i) != up_moved.active(i) || active(i) != down_moved.active(i)) continue;
            const double difference = (up_moved.loss(*this, i) - down_moved.loss(*this, i)) / (2 * step);
            const double found = expected[i];
            if (!(std::fabs(difference - found) <= 1e-4 * (1 + std::fabs(found)))) fail("a wrong gradient", i);
        }
    }

    bool same(const Work& other) const {
        auto equal = [](const auto& a, const auto& b) {
            return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(a[0])) == 0);
        };
        return equal(x, other.x) && equal(s, other.s) && equal(lam, other.lam) && equal(nu, other.nu) &&
               equal(low, other.low) && equal(up, other.up) && equal(status, other.status) && equal(weak, other.weak) &&
               equal(iterations, other.iterations) && equal(residuals, other.residuals) && equal(dQ, other.dQ) && equal(dF, other.dF) &&
               equal(dq, other.dq) && equal(dA, other.dA) && equal(db, other.db) && equal(dG, other.dG) &&
               equal(dh, other.dh) && equal(dlow, other.dlow) && equal(dup, other.dup);
    }
};

template <class T> void all_kinds(Kind sizes, const std::vector<Index>& counts, uint64_t seed) {
    for (Index count : counts)
        for (Sharing sharing : {NONE, MATRICES, ONLY_Q, ALL_BUT_q}) {
            Work<T> work(sizes, count, sharing, count > 1, seed++);
            work.solve(1, true, count);
            work.check();
            work.pull_back(1, true);
            work.pull_many(3);
            work.pull_columns(2);
            work.check_gradients(seed);
            // Without gradients, in two parts, on several threads: the same bits.
            Work<T> again(sizes, count, sharing, count > 1, seed - 1);
            again.solve(4, false, count / 2 / 8 * 8);
            again.check();
            again.solve(4, true, count);
            again.pull_back(4, true);
            if (!again.same(work)) work.fail("threads change the answer", 0);
            work.pull_back(2, false);
        }
}

// Several callers at once, each with problems of its own, all wanting the same threads.
void callers_at_once() {
    const Kind sizes[] = {{6, 1, 5, true, true}, {34, 3, 20, false, true}, {12, 0, 20, false, false}};
    std::vector<std::thread> callers;
    for (int caller = 0; caller < 6; caller++)
        callers.emplace_back([caller, &sizes] {
            for (int turn = 0; turn < 3; turn++) {
                const Kind mine = sizes[(caller + turn) % 3];
                const Sharing sharing = caller % 2 ? MATRICES : NONE;
                Work<double> alone(mine, 64, sharing, true, 7), together(mine, 64, sharing, true, 7);
                alone.solve(1, true, 64), together.solve(3, true, 64);
                alone.pull_back(1, true), together.pull_back(3, true);
                together.check();
                if (!together.same(alone)) together.fail("callers disturb each other", 0);
            }
        });
    for (auto& caller : callers) caller.join();
}

}  // namespace

int main() {
#if defined(__AVX512F__)
    const int level = 2;
#elif defined(__AVX2__)
    const int level = 1;
#else
    const int level = 0;
#endif
    if (diffopt_cpu_level() < level) {
        std::puts("skipped: this machine lacks the instructions");
        return 0;
    }
    const Kind small[] = {
        {1, 0, 0, false, false}, {1, 0, 1, false, false},  {1, 1, 0, false, false},  {1, 0, 0, true, true},
        {2, 1, 1, true, false},  {3, 3, 0, false, false},  {5, 4, 3, false, true},   {6, 2, 5, true, true},
        {7, 0, 13, false, false}, {16, 3, 12, true, true}, {17, 0, 32, false, false}, {24, 8, 8, true, false},
    };
    const Kind large[] = {
        {33, 0, 0, false, false}, {25, 8, 20, false, false}, {18, 0, 33, false, false}, {33, 4, 20, true, true},
        {41, 40, 3, false, true}, {37, 5, 60, false, false},
    };
    uint64_t seed = 1;
    for (const Kind& sizes : small) {
        all_kinds<double>(sizes, {0, 1, 3, 9, 64}, seed += 100);
        all_kinds<float>(sizes, {1, 9}, seed += 100);
    }
    for (const Kind& sizes : large) {
        all_kinds<double>(sizes, {0, 1, 3, 9}, seed += 100);
        all_kinds<float>(sizes, {1, 4}, seed += 100);
    }
    all_kinds<double>({36, 2, 20, true, true}, {64}, seed += 100);
    // The general method: more rows, structured Hessians, other reductions.
    const Kind general[] = {
        {5, 2, 20, true, true},       {20, 3, 60, false, true},      {1, 0, 3, true, true},
        {10, 4, 3, true, true, 0},    {17, 3, 9, true, false, 3},    {6, 0, 0, true, true, 0},
        {9, 2, 4, false, false, 1},   {12, 3, 9, true, true, -1, REDUCE_PRIMAL}, {11, 2, 7, true, false, 2, REDUCE_PRIMAL},
        {33, 4, 20, true, true, -1, REDUCE_AUTO, false},
    };
    for (const Kind& sizes : general) {
        all_kinds<double>(sizes, {0, 1, 3, 20}, seed += 100);
        all_kinds<float>(sizes, {1, 4}, seed += 100);
    }
    callers_at_once();
    std::printf("%d errors\n", errors.load());
    return errors.load() ? 1 : 0;
}
