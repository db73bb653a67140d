// A block of plain memory that never changes once built: made here, or mapped from a file that another process wrote.
//
// Invariants
// - A file is put in place by one rename after all of it was written: a reader sees none or the whole.
// - A block is mapped only if its magic, its size and its checksum are right; then its contents are trusted.
// - Who maps a file keeps its memory when the name goes away: no reader is ever cut off.
#pragma once
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>
#include <system_error>

#include "arena.h"

namespace slipstream {

// bytes: of the whole block. sizes: the meaning is the owner's.
struct BlockHeader {
  char magic[8];
  uint64_t bytes, checksum;
  uint64_t sizes[5];
};
static_assert(sizeof(BlockHeader) == kLine, "what follows begins at a cache line");

struct BadBlock : std::invalid_argument {
  using std::invalid_argument::invalid_argument;
};

class Block {
 public:
  // Uninitialised but for the header. From one arena for the whole process: the block that this one replaces leaves warm
  // pages there.
  static std::shared_ptr<char> allocate(size_t bytes) {
    static Arena& arena = *new Arena(size_t{1} << 38);  // never destroyed: blocks may be in use until the process ends
    const Arena::Run run = arena.take((bytes + Arena::kChunkBytes - 1) / Arena::kChunkBytes);
    std::shared_ptr<char> block(arena.base() + run.first * Arena::kChunkBytes, [run](char*) { arena.give({run}); });
    std::memset(block.get(), 0, sizeof(BlockHeader));
    // What rounds the size up is part of the checksum.
    std::memset(block.get() + bytes - 8, 0, 8);
    return block;
  }

  static const BlockHeader& header(const char* block) { return *reinterpret_cast<const BlockHeader*>(block); }

  static void seal(char* block, const char (&magic)[9], uint64_t bytes) {
    BlockHeader& h = *reinterpret_cast<BlockHeader*>(block);
    std::memcpy(h.magic, magic, sizeof h.magic);
    h.bytes = bytes;
    h.checksum = 0;
  }

  // Raises std::system_error when the file cannot be written.
  static void write(const char* block, const std::string& path) {
    BlockHeader h = header(block);
    h.checksum = checksum(block, h.bytes);
    const std::string partial = path + ".partial-" + std::to_string(getpid());
    const int file = open(partial.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (file < 0) throw failure("cannot create " + partial);
    const bool written = write_all(file, reinterpret_cast<const char*>(&h), sizeof h) &&
                         write_all(file, block + sizeof h, h.bytes - sizeof h);
    const int error = written ? 0 : errno;
    close(file);
    if (error || rename(partial.c_str(), path.c_str()) != 0) {
      if (error) errno = error;
      const std::system_error raised = failure("cannot write " + path);
      unlink(partial.c_str());
      throw raised;
    }
  }

  // Raises std::system_error when the file cannot be read, BadBlock when it is not a whole block of this kind.
  static std::shared_ptr<const char> map(const std::string& path, const char (&magic)[9]) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (file < 0) throw failure("cannot open " + path);
    struct stat facts {};
    const bool known = fstat(file, &facts) == 0;
    const size_t bytes = known ? static_cast<size_t>(facts.st_size) : 0;
    void* at = bytes >= sizeof(BlockHeader) ? mmap(nullptr, bytes, PROT_READ, MAP_SHARED | MAP_POPULATE, file, 0) : MAP_FAILED;
    const std::system_error raised = failure("cannot map " + path);
    close(file);
    if (known && bytes < sizeof(BlockHeader)) throw BadBlock(path + " is no index: it has " + std::to_string(bytes) + " bytes");
    if (at == MAP_FAILED) throw raised;
    std::shared_ptr<const char> block(static_cast<const char*>(at),
                                      [bytes](const char* mapped) { munmap(const_cast<char*>(mapped), bytes); });
    const BlockHeader& h = header(block.get());
    if (std::memcmp(h.magic, magic, sizeof h.magic) != 0) throw BadBlock(path + " is no index of this kind or version");
    if (h.bytes != bytes) throw BadBlock(path + " is cut: " + std::to_string(bytes) + " of " + std::to_string(h.bytes) + " bytes");
    if (h.checksum != checksum(block.get(), bytes)) throw BadBlock("the checksum of " + path + " is wrong");
    return block;
  }

 private:
  static std::system_error failure(const std::string& what) { return {errno, std::generic_category(), what}; }

  static bool write_all(int file, const char* data, size_t bytes) {
    while (bytes) {
      const ssize_t done = ::write(file, data, bytes);
      if (done < 0 && errno == EINTR) continue;
      if (done <= 0) return false;
      data += done;
      bytes -= static_cast<size_t>(done);
    }
    return true;
  }

  // Of all but the checksum itself; blocks are whole words.
  static uint64_t checksum(const char* block, uint64_t bytes) {
    uint64_t hash = 0xCBF29CE484222325ull;
    for (uint64_t i = 0; i + 8 <= bytes; i += 8) {
      uint64_t word = 0;
      if (i != offsetof(BlockHeader, checksum)) std::memcpy(&word, block + i, 8);
      hash = (hash ^ word) * 0x9E3779B97F4A7C15ull;
      hash ^= hash >> 29;
    }
    return hash;
  }
};

}  // namespace slipstream
