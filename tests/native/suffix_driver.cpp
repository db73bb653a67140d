// Exercises the suffix index under a sanitizer: `make sanitize` builds it with ASan + UBSan, then with TSan.
// Random, periodic and unary text against brute force; readers that draft and extend while prompts are rebuilt and
// dropped under them. Exit status 0 means that every answer was right and the sanitizer found nothing.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "suffix_set.h"

using namespace slipstream;

static void check(bool ok, const char* what) {
  if (ok) return;
  std::fprintf(stderr, "suffix_driver: %s\n", what);
  std::exit(1);
}

static std::vector<int32_t> random_text(std::mt19937& rng, int length, int vocab) {
  std::vector<int32_t> text(static_cast<size_t>(length));
  for (int32_t& token : text) token = static_cast<int32_t>(rng() % static_cast<unsigned>(vocab));
  return text;
}

static Corpus corpus_of(const std::vector<std::vector<int32_t>>& texts) {
  Corpus corpus{{}, {0}, {}, {}};
  for (const auto& text : texts) {
    corpus.tokens.insert(corpus.tokens.end(), text.begin(), text.end());
    corpus.offsets.push_back(static_cast<int64_t>(corpus.tokens.size()));
    corpus.weights.push_back(1.0f);
    corpus.ages.push_back(1);
  }
  return corpus;
}

static float count(const std::vector<int32_t>& text, const std::vector<int32_t>& context, int32_t next) {
  float found = 0.0f;
  for (size_t end = context.size(); end < text.size(); ++end)
    found += std::equal(context.begin(), context.end(), text.begin() + static_cast<long>(end - context.size())) &&
             text[end] == next;
  return found;
}

// The weight of every follower of contexts up to three tokens, in both tiers.
static void check_counts(const std::vector<int32_t>& text) {
  SetOptions options;
  options.min_match = 1;
  SuffixIndexSet set(options, 1, 0);
  set.publish("p", corpus_of({text}), "");
  set.begin(1, "p", nullptr, 0);
  const int64_t uid = 1, offsets[2] = {0, static_cast<int64_t>(text.size())};
  set.extend(&uid, 1, text.data(), offsets, offsets[1]);
  for (size_t at = 0; at + 3 < text.size(); at += 7)
    for (size_t length = 1; length <= 3; ++length) {
      const std::vector<int32_t> context(text.begin() + static_cast<long>(at),
                                         text.begin() + static_cast<long>(at + length));
      for (const bool live : {false, true})
        for (const auto& [token, weight] : set.follow_weights("p", context, live))
          check(weight == count(text, context, token), "a count differs from brute force");
    }
}

struct Buffers {
  explicit Buffers(int64_t rows, int64_t width)
      : limit(rows, static_cast<int32_t>(width)), tokens(rows * width), count(rows), match(rows), age(rows), branching(rows, 1),
        source(rows), cells(rows * width), parents(rows * width), min_prob(rows, 0.05f), probs(rows * width),
        width(width) {}
  DraftRows rows() {
    return {static_cast<int64_t>(count.size()), width, limit.data(), min_prob.data(), branching.data(), tokens.data(),
            count.data(), source.data(), age.data(), match.data(), probs.data(), cells.data(), parents.data()};
  }
  std::vector<int32_t> limit, tokens, count, match, age, branching;
  std::vector<int8_t> source;
  std::vector<int16_t> cells, parents;
  std::vector<float> min_prob, probs;
  int64_t width;
};

constexpr int32_t kPromptText[3] = {1, 2, 3};

// One engine: opens requests, drafts, extends and closes them, again and again.
static void serve(SuffixIndexSet& set, int64_t first_uid, int rounds) {
  constexpr int64_t kRows = 12;
  std::mt19937 rng(static_cast<unsigned>(first_uid));
  Buffers buffers(kRows, 8);
  for (int round = 0; round < rounds; ++round) {
    std::vector<int64_t> uids, offsets{0};
    for (int64_t row = 0; row < kRows; ++row) {
      uids.push_back(first_uid + row);
      offsets.push_back((row + 1) * 2);
      set.begin(uids.back(), std::to_string(row % 3), kPromptText, 3);
    }
    for (int step = 0; step < 40; ++step) {
      std::fill(buffers.branching.begin(), buffers.branching.end(), 1 + step % 3);
      set.propose(uids.data(), buffers.rows());
      for (int64_t i = 0; i < kRows; ++i)
        for (int32_t j = 0; j < buffers.count[i]; ++j)
          check(buffers.tokens[i * 8 + j] >= 0 && buffers.tokens[i * 8 + j] < 6, "a draft was never in the text");
      const std::vector<int32_t> values = random_text(rng, kRows * 2, 6);
      set.extend(uids.data(), kRows, values.data(), offsets.data(), kRows * 2);
    }
    for (const int64_t uid : uids) set.end(uid);
  }
}

static void rebuild_under_readers(size_t num_threads) {
  SuffixIndexSet set(SetOptions{}, num_threads, 1);
  std::atomic<bool> stop{false};
  std::thread publisher([&] {
    std::mt19937 rng(7);
    for (int i = 0; !stop; ++i) {
      set.publish(std::to_string(i % 3), corpus_of({random_text(rng, 300, 6), random_text(rng, 200, 6)}), "");
      if (i % 5 == 0) set.publish_shared(random_text(rng, 500, 6), {0, 200, 500}, "");
      if (i % 4 == 0) set.wait();  // rebuilds must not pile up where the builder is the slower one
      if (i % 11 == 0) set.drop(std::to_string(i % 3));
      check(set.stats().open_requests <= 24, "more requests than were opened");
      std::this_thread::yield();
    }
  });
  std::thread other([&] { serve(set, 1000, 25); });
  serve(set, 0, 25);
  other.join();
  stop = true;
  publisher.join();
  set.wait();
  set.close();
  bool refused = false;
  try {
    set.begin(1, "0", nullptr, 0);
  } catch (const ClosedIndex&) {
    refused = true;
  }
  check(refused, "a closed index accepted a request");
}

int main() {
  std::mt19937 rng(1);
  for (const int vocab : {2, 5, 400}) check_counts(random_text(rng, 300, vocab));
  check_counts(std::vector<int32_t>(300, 4));
  std::vector<int32_t> periodic;
  for (int i = 0; i < 300; ++i) periodic.push_back(i % 7);
  check_counts(periodic);
  for (const size_t num_threads : {1, 3}) rebuild_under_readers(num_threads);
  std::puts("suffix_driver: passed");
}
