// The scheduler of simt.h.
#include "simt.h"

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

namespace llmos::simt {
namespace {

constexpr size_t kStackBytes = 256 * 1024;

enum class State { Ready, AtBarrier, AtMeeting, Finished };

// A place where code runs: a thread of the block, or the scheduler.
struct Fiber {
  ucontext_t context;
  jmp_buf jump;             // Where it goes on, once it has started.
  bool has_started = true;  // Threads set it to false.
  std::unique_ptr<char[]> stack;
  const void* bottom = nullptr;
  size_t bytes = 0;
  State state = State::Finished;
  dim3 index;
  int line = 0;  // Where it waits.
};

// What lanes of a warp wait for together. Values are kept until the next meeting is complete.
struct Warp {
  uint32_t mask = 0, arrived = 0;
  int line = 0, turn = 0;
  uint64_t values[2][kWarp];
  int64_t meetings = 0;  // Of all lanes.
};

std::mt19937_64 order;
std::vector<Fiber> fibers;
std::vector<Warp> warps;
Fiber scheduler;
int current = 0;
int64_t barriers_passed = 0, current_block = 0;
const std::function<void()>* thread_body = nullptr;
std::string error;

// Switch from one to another. Jumps take a fifth of the time of swapcontext, which asks the system
// for the mask of signals, but the sanitizer follows that alone.
void go(Fiber& from, Fiber& to, bool ends = false) {
#if defined(__SANITIZE_ADDRESS__)
  void* mine = nullptr;
  __sanitizer_start_switch_fiber(ends ? nullptr : &mine, to.bottom, to.bytes);
  swapcontext(&from.context, &to.context);
  __sanitizer_finish_switch_fiber(mine, nullptr, nullptr);
#else
  (void)ends;
  if (_setjmp(from.jump)) return;
  if (to.has_started) _longjmp(to.jump, 1);
  to.has_started = true;
  setcontext(&to.context);
#endif
}

Fiber& running() { return fibers[size_t(current)]; }

void wait(State state, int line) {
  running().state = state;
  running().line = line;
  go(running(), scheduler);
}

void enter() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &scheduler.bottom, &scheduler.bytes);
#endif
  (*thread_body)();
  running().state = State::Finished;
  go(running(), scheduler, true);
}

void start(Fiber& fiber, size_t i) {
  if (!fiber.stack) fiber.stack = std::make_unique<char[]>(kStackBytes);
  fiber.bottom = fiber.stack.get();
  fiber.bytes = kStackBytes;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, enter, 0);
  const unsigned x = unsigned(i) % block_size.x, rest = unsigned(i) / block_size.x;
  fiber.index = {x, rest % block_size.y, rest / block_size.y};
  fiber.has_started = false;
  fiber.state = State::Ready;
}

// Let all threads go on that wait at a barrier; it is an error if not all do.
void pass_barrier() {
  const Fiber* first = nullptr;
  for (const Fiber& fiber : fibers) {
    if (fiber.state == State::AtMeeting)
      error = "a shuffle waits for absent lanes, line " + std::to_string(fiber.line);
    if (fiber.state == State::AtBarrier && !first) first = &fiber;
  }
  if (!error.empty()) return;
  for (const Fiber& fiber : fibers)
    if (fiber.state != State::AtBarrier || fiber.line != first->line)
      error = "threads disagree about the barrier of line " + std::to_string(first->line);
  if (!error.empty()) return;
  for (Fiber& fiber : fibers) fiber.state = State::Ready;
  ++barriers_passed;
}

void run_block() {
  ++current_block;
  ++barriers_passed;
  for (Warp& warp : warps) warp = {};
  for (size_t i = 0; i < fibers.size(); ++i) start(fibers[i], i);
  std::vector<int> ready;
  while (error.empty()) {
    ready.clear();
    bool all_finished = true;
    for (size_t i = 0; i < fibers.size(); ++i) {
      if (fibers[i].state == State::Ready) ready.push_back(int(i));
      all_finished = all_finished && fibers[i].state == State::Finished;
    }
    if (all_finished) return;
    if (ready.empty()) {
      pass_barrier();
      continue;
    }
    std::shuffle(ready.begin(), ready.end(), order);
    for (int i : ready) {
      current = i;
      thread_index = running().index;
      go(scheduler, running());
      if (!error.empty()) return;
    }
  }
}

}  // namespace

void fail(const std::string& why) {
  error = why;
  go(running(), scheduler);
  std::abort();  // A launch with an error does not come back.
}

void run(dim3 grid, dim3 block_, const std::function<void()>& body) {
  grid_size = grid;
  block_size = block_;
  const size_t threads = size_t(block_.x) * block_.y * block_.z;
  if (threads < 1 || threads > 1024)
    throw std::runtime_error("simt: a block of " + std::to_string(threads) + " threads");
  fibers.resize(threads);
  warps.resize((threads + kWarp - 1) / kWarp);
  thread_body = &body;
  error.clear();
  std::vector<size_t> blocks(size_t(grid.x) * grid.y * grid.z);
  std::iota(blocks.begin(), blocks.end(), size_t(0));
  std::shuffle(blocks.begin(), blocks.end(), order);
  for (size_t i : blocks) {
    const unsigned x = unsigned(i % grid.x), rest = unsigned(i / grid.x);
    block_index = {x, rest % grid.y, rest / grid.y};
    run_block();
    if (!error.empty()) throw std::runtime_error("simt: " + error);
  }
}

int lane() { return current % kWarp; }

void barrier(int line) { wait(State::AtBarrier, line); }

Lanes meet(int line, uint32_t mask, uint64_t value) {
  Warp& warp = warps[size_t(current / kWarp)];
  const int first = current / kWarp * kWarp;
  const int lanes = std::min(kWarp, int(fibers.size()) - first);
  const uint32_t there = lanes == kWarp ? kAllLanes : (1u << lanes) - 1;
  const auto fail_here = [&](const std::string& why) {
    fail(why + ", line " + std::to_string(line));
  };
  if (!warp.arrived) {
    for (int i = 0; i < kWarp; ++i)
      if (mask >> i & 1 && (i >= lanes || fibers[size_t(first + i)].state == State::Finished))
        fail_here("lane " + std::to_string(i) + " is in a mask, but absent");
    warp.mask = mask;
    warp.line = line;
  } else if (warp.mask != mask || warp.line != line) {
    fail_here("lanes of a warp meet at different places");
  }
  if (!(mask >> lane() & 1)) fail_here("a lane is not in its own mask");
  const int turn = warp.turn;
  warp.values[turn][lane()] = value;
  warp.arrived |= 1u << lane();
  if (warp.arrived != mask) {
    wait(State::AtMeeting, line);
  } else {
    warp.arrived = 0;
    warp.turn ^= 1;
    warp.meetings += mask == there;
    for (int i = 0; i < lanes; ++i)
      if (mask >> i & 1) fibers[size_t(first + i)].state = State::Ready;
  }
  return warp.values[turn];
}

Access Access::now() { return {current, barriers_passed, warps[size_t(current / kWarp)].meetings}; }

bool Access::conflicts_with(const Access& earlier) const {
  if (earlier.thread == thread || earlier.barriers != barriers) return false;
  return earlier.thread / kWarp != thread / kWarp || earlier.meetings == meetings;
}

void Word::on_read() {
  const Access now = Access::now();
  if (block != current_block) fail("shared memory is read before it is written");
  if (now.conflicts_with(write)) fail("shared memory is read without a barrier after its write");
  reads.push_back(now);
}

void Word::on_write() {
  const Access now = Access::now();
  if (now.conflicts_with(write)) fail("two threads write to one word of shared memory");
  for (const Access& read : reads)
    if (now.conflicts_with(read)) fail("shared memory is written without a barrier after a read");
  reads.clear();
  write = now;
  block = current_block;
}

}  // namespace llmos::simt

extern "C" {

// Choose the order in which threads and blocks run.
[[gnu::visibility("default")]] void llmos_simt_seed(uint64_t seed) {
  llmos::simt::order.seed(seed);
}

// Write the counts of accesses since the last call, loads then stores of 1 to 16 bytes.
[[gnu::visibility("default")]] void llmos_simt_counts(int64_t* to) {
  std::memcpy(to, &llmos::simt::counts, sizeof(llmos::simt::counts));
  llmos::simt::counts = {};
}
}
