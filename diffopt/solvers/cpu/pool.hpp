// Threads that share out the instances of a batch. Which thread does what changes no result.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <functional>
#include <memory>
#include <mutex>
#include <thread>
#include <vector>

#if !defined(_WIN32)
#include <unistd.h>
#endif
#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace diffopt {

class Pool {
    using Clock = std::chrono::steady_clock;
    static constexpr int64_t SHORT = 50, LONG = 500;  // microseconds

  public:
    // Calls work(chunk) for each chunk, on up to `threads` threads, the caller among them.
    static void run(int64_t chunks, int64_t threads, const std::function<void(int64_t)>& work) {
        if (threads > chunks) threads = chunks;
        Pool* pool = threads > 1 ? instance() : nullptr;
        // A second caller at the same time works alone: the cores are taken.
        if (!pool || !pool->busy_.try_lock()) {
            for (int64_t c = 0; c < chunks; c++) work(c);
            return;
        }
        std::lock_guard<std::mutex> busy(pool->busy_, std::adopt_lock);
        pool->share(chunks, threads, work);
    }

  private:
    // The chunks of one thread. It takes those first, and then what is left of others: so a thread gets the same part of a
    // batch in every call, which it finds in its own cache. (From another's it takes longer than to compute it.)
    struct alignas(64) Share {
        std::atomic<int64_t> next{0};
        int64_t end = 0;
    };

    std::mutex busy_, mutex_;
    std::condition_variable wake_, done_;
    std::vector<std::thread> threads_;
    const std::function<void(int64_t)>* work_ = nullptr;
    std::atomic<int64_t> generation_{0}, running_{0};
    int64_t wanted_ = 0, joined_ = 0;
    std::unique_ptr<Share[]> shares_;
    int64_t count_ = 0, room_ = 0;  // shares, and the most there is room for
    Clock::time_point idle_since_ = Clock::now();
    std::atomic<int64_t> patience_{SHORT};

    // Waking a thread takes as long as several small problems: so both sides look for some microseconds before they sleep.
    // (Longer would take the core from others. `condition` is asked without the lock.) A thread looks for longer only if the
    // last job came soon after the one before, as in a loop of small batches: whoever calls now and then loses `SHORT`.
    template <class Condition> static void look_for(const Condition& condition, int64_t microseconds) {
        const auto until = Clock::now() + std::chrono::microseconds(microseconds);
        while (!condition() && Clock::now() < until) {
#if defined(__SSE2__)
            for (int i = 0; i < 16 && !condition(); i++) _mm_pause();
#else
            std::this_thread::yield();
#endif
        }
    }

    // Never destroyed: its threads sleep until the process ends. A forked child has none of them and makes its own.
    static Pool* instance() {
        static std::mutex guard;
        static Pool* pool = nullptr;
        static int64_t owner = 0;
        std::unique_lock<std::mutex> lock(guard, std::try_to_lock);
        if (!lock) return nullptr;
#if defined(_WIN32)
        const int64_t process = 1;
#else
        const int64_t process = getpid();
#endif
        if (owner != process) {
            pool = new Pool;
            owner = process;
        }
        return pool;
    }

    void share(int64_t chunks, int64_t threads, const std::function<void(int64_t)>& work) {
        const int64_t helpers = threads - 1;
        {
            std::lock_guard<std::mutex> lock(mutex_);
            try {
                while (static_cast<int64_t>(threads_.size()) < helpers) {
                    const int64_t number = static_cast<int64_t>(threads_.size()) + 1;
                    threads_.emplace_back([this, number] { live(number); });
                }
            } catch (const std::system_error&) {
                // No more threads to be had: those that exist, and the caller, do the work.
            }
            if (room_ < threads) {
                shares_ = std::make_unique<Share[]>(static_cast<std::size_t>(threads));
                room_ = threads;
            }
            count_ = threads;
            for (int64_t i = 0; i < threads; i++) {
                shares_[static_cast<std::size_t>(i)].next = i * chunks / threads;
                shares_[static_cast<std::size_t>(i)].end = (i + 1) * chunks / threads;
            }
            patience_ = Clock::now() - idle_since_ < std::chrono::microseconds(LONG) ? LONG : SHORT;
            work_ = &work;
            wanted_ = helpers;
            joined_ = 0;
            generation_++;
        }
        wake_.notify_all();
        run_from(0, work);
        {
            std::lock_guard<std::mutex> lock(mutex_);
            wanted_ = 0;  // who has not woken yet need not
        }
        look_for([this] { return running_ == 0; }, SHORT);
        std::unique_lock<std::mutex> lock(mutex_);
        done_.wait(lock, [this] { return running_ == 0; });
        work_ = nullptr;
        idle_since_ = Clock::now();
    }

    // Runs the chunks of share `first`, then those that are left of the others.
    void run_from(int64_t first, const std::function<void(int64_t)>& work) {
        for (int64_t i = 0; i < count_; i++) {
            Share& share = shares_[static_cast<std::size_t>((first + i) % count_)];
            for (int64_t c; (c = share.next.fetch_add(1)) < share.end;) work(c);
        }
    }

    void live(int64_t number) {
        int64_t seen = 0;
        std::unique_lock<std::mutex> lock(mutex_);
        for (;;) {
            lock.unlock();
            look_for([&] { return generation_ != seen; }, patience_);
            lock.lock();
            wake_.wait(lock, [&] { return generation_ != seen && joined_ < wanted_; });
            seen = generation_;
            joined_++;
            running_++;
            const auto* work = work_;
            lock.unlock();
            run_from(number % count_, *work);
            lock.lock();
            if (--running_ == 0) done_.notify_one();
        }
    }
};

}  // namespace diffopt
