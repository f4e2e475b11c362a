// Runs a plan: every step by all threads, which meet after each one. One parallel region serves the whole plan, since to
// open one costs as much as a small step.

#include <atomic>
#include <chrono>
#include <memory>
#include <thread>

#include "plan.h"
#include "tiles.h"

namespace cnmix {
namespace {

#if defined(CNMIX_X86)

// The tasks of a step that one thread begins with; others help where theirs are done.
struct alignas(64) Share {
  std::atomic<int64_t> next{0};
};

class Team {
 public:
  explicit Team(int64_t threads) : threads_(threads), shares_(new Share[static_cast<size_t>(2 * threads)]) {}

  // Waits until all threads are here. They come within microseconds of each other, unless other programs have the cores.
  void meet() {
    constexpr int kPatience = 4000;
    const int64_t phase = phase_.load(std::memory_order_relaxed);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) == threads_ - 1) {
      arrived_.store(0, std::memory_order_relaxed);
      phase_.store(phase + 1, std::memory_order_release);
      return;
    }
    for (int turns = 0; phase_.load(std::memory_order_acquire) == phase; ++turns)
      if (turns < kPatience)
        _mm_pause();
      else
        std::this_thread::yield();
  }

  // Calls task(i) for the thread's own part of [0, count), the same part in every step, since what it wrote before lies in
  // its cache; then for what others have left. `step` tells this step's counters from those of its neighbours.
  template <typename Task>
  void share(int64_t step, int64_t thread, int64_t count, const Task& task) {
    Share* shares = shares_.get() + step % 2 * threads_;
    for (int64_t turn = 0; turn < threads_; ++turn) {
      const int64_t owner = (thread + turn) % threads_;
      const int64_t begin = count * owner / threads_, end = count * (owner + 1) / threads_;
      std::atomic<int64_t>& next = shares[owner].next;
      if (turn > 0 && begin + next.load(std::memory_order_relaxed) >= end) continue;
      for (int64_t i = begin + next++; i < end; i = begin + next++) task(i);
    }
  }

  // Before the thread arrives at the end of `step`: nobody uses the counters of the next one yet.
  void clear_next(int64_t step, int64_t thread) {
    shares_[static_cast<size_t>((step + 1) % 2 * threads_ + thread)].next.store(0, std::memory_order_relaxed);
  }

 private:
  const int64_t threads_;
  std::unique_ptr<Share[]> shares_;
  alignas(64) std::atomic<int64_t> arrived_{0};
  alignas(64) std::atomic<int64_t> phase_{0};
};

int64_t tasks_of(const CnmixStep& step) {
  switch (step.kind) {
    case PRODUCT:
      return product_tasks(step);
    case DEPTHWISE:
      return depthwise_tasks(step);
    case ELEMENTS:
      return elements_tasks(step);
    case MAX_POOL:
      return pool_tasks(step);
    default:
      return copy_tasks(step);
  }
}

void run_task(const Job& job, int64_t task, Worker& worker) {
  switch (job.step->kind) {
    case PRODUCT:
      return run_product(job, task, worker);
    case DEPTHWISE:
      return run_depthwise(job, task, worker);
    case ELEMENTS:
      return run_elements(job, task, worker);
    case MAX_POOL:
      return run_pool(job, task);
    case COPY:
      return run_copy(job, task);
    default:
      return run_enlarge(job, task);
  }
}

// Puts the addresses of this run in.
void place_job(const CnmixStep& step, const CnmixRun& run, int64_t turn, Job& job) {
  const auto at = [&](const CnmixPlace& place) {
    return place.base < 0 ? nullptr : run.bases[place.base] + turn * run.strides[place.base] + place.offset;
  };
  job.step = &step;
  job.source = at(step.source);
  job.target = at(step.target);
  job.planes = step.source.base >= 0 && run.planes[step.source.base] != 0;
  job.chain.count = step.stage_count;
  for (int64_t i = 0; i < step.stage_count; ++i) {
    const CnmixStage& s = step.stages[i];
    job.chain.stages[i] = {s.kind, s.values, s.terms, s.number, s.other, at(s.place), s.stride};
  }
}

void work(const CnmixPlan& plan, const CnmixRun& run, Team& team, Worker& worker) {
#if defined(CNMIX_HAS_AMX)
  if (!worker.vnni) configure_tiles();
#endif
  auto before = std::chrono::steady_clock::now();
  Job job;
  for (int64_t i = 0; i < run.turns * plan.count; ++i) {
    const int64_t s = i % plan.count;
    place_job(plan.steps[s], run, i / plan.count, job);
    worker.prepared_step = nullptr;
    team.share(i, worker.thread, tasks_of(plan.steps[s]), [&](int64_t task) { run_task(job, task, worker); });
    team.clear_next(i, worker.thread);
    team.meet();
    if (run.seconds && worker.thread == 0) {
      const auto now = std::chrono::steady_clock::now();
      run.seconds[s] += std::chrono::duration<double>(now - before).count();
      before = now;
    }
  }
#if defined(CNMIX_HAS_AMX)
  if (!worker.vnni) release_tiles();
#endif
}

enum Outcome { FINITE = 0, NOT_FINITE = 1, NO_MEMORY = 2 };

int run_plan(const CnmixPlan& plan, const CnmixRun& given) {
  std::atomic<int> bad{0}, failed{0};
  const bool vnni = active_isa == AVX512_VNNI;
  const auto prepare = [&](int64_t threads) {
    for (int64_t s = 0; s < plan.count; ++s)
      if (plan.steps[s].kind == PRODUCT) lay_out_product(plan.steps[s], threads);
  };
  const auto run = [&](int64_t thread, int64_t threads, Team& team) {
    Worker worker;
    worker.thread = thread;
    worker.threads = threads;
    worker.vnni = vnni;
    work(plan, given, team, worker);
    for (float note : worker.bad)
      if (note != note) bad = 1;
    if (worker.failed) failed = 1;
  };
  const int64_t wanted = max_threads();
  if (wanted <= 1) {
    prepare(1);
    Team team(1);
    run(0, 1, team);
  } else {
#if defined(_OPENMP)
    std::unique_ptr<Team> team;
#pragma omp parallel num_threads(static_cast<int>(wanted))
    {
#pragma omp single
      {
        const int64_t granted = omp_get_num_threads();
        prepare(granted);
        team.reset(new Team(granted));
      }
      run(omp_get_thread_num(), omp_get_num_threads(), *team);
    }
#endif
  }
  return failed ? NO_MEMORY : bad ? NOT_FINITE : FINITE;
}

#endif

}  // namespace
}  // namespace cnmix

using namespace cnmix;

// Returns 0; 1 where a quantized value was not finite, and then the results are none; 2 where memory was missing.
CNMIX_API int cnmix_run_plan(const CnmixPlan* plan, const CnmixRun* run) {
#if defined(CNMIX_X86)
  return run_plan(*plan, *run);
#else
  return 2;
#endif
}
