// Runs the kernel of cuda/resident.h on the CPU, one file per batch, and prints what it did:
//
//   run_resident FILE BLOCKS SEED...
//
// A file has blocks of bytes, each behind its length as int64 and at a multiple of 16: [half, size, layout] as int64 (0
// is float16, 1 bfloat16; 0 is NHWC, 1 NCHW), images, order or nothing, decisions or nothing, then for the network and
// for the policy, or nothing, weights, biases, convolutions, head, its biases, [ends of the three stages] as int32.
// BLOCKS: of a cluster. Every seed is another schedule, and must give the same bits; the results, and behind them the
// decisions, are written to FILE.out.

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fstream>
#include <iterator>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cuda/resident.h"

namespace {

using namespace dynexec;

// Memory that is nobody else's, so that an access outside of it is outside of all buffers.
struct Bytes {
  std::vector<unsigned char> values;
  unsigned char* begin = nullptr;

  explicit Bytes(size_t size) : values(size + 16) {
    begin = values.data() + (16 - reinterpret_cast<uintptr_t>(values.data()) % 16) % 16;
    bytes = static_cast<int64_t>(size);
  }
  Bytes(Bytes&&) = default;
  int64_t bytes = 0;

  template <class T>
  T* as() const {
    return bytes ? reinterpret_cast<T*>(begin) : nullptr;
  }
};

class File {
 public:
  explicit File(const std::string& path) : file_(path, std::ios::binary) {
    file_.exceptions(std::ios::failbit | std::ios::badbit);
  }
  Bytes next() {
    int64_t size[2];
    file_.read(reinterpret_cast<char*>(size), sizeof(size));
    Bytes bytes(size[0]);
    file_.read(reinterpret_cast<char*>(bytes.begin), size[0]);
    char padding[16];
    file_.read(padding, (16 - size[0] % 16) % 16);
    return bytes;
  }

 private:
  std::ifstream file_;
};

struct Loaded {
  Bytes weights, biases, convs, head, head_biases, ends;

  explicit Loaded(File& file)
      : weights(file.next()),
        biases(file.next()),
        convs(file.next()),
        head(file.next()),
        head_biases(file.next()),
        ends(file.next()) {}

  resident::Network network() const {
    resident::Network found{weights.as<unsigned char>(), biases.as<float>(), convs.as<resident::Conv>(),
                            head.as<float>(), head_biases.as<float>(), {}, static_cast<int>(head_biases.bytes / 4)};
    if (ends.bytes) std::memcpy(found.ends, ends.begin, sizeof(found.ends));
    return found;
  }

  void add(const char* whose, std::vector<simt::Buffer>& buffers) const {
    const std::pair<const char*, const Bytes*> all[] = {
        {"weights", &weights}, {"biases", &biases}, {"convs", &convs}, {"head", &head}, {"head biases", &head_biases}};
    for (const auto& [name, bytes] : all) {
      buffers.push_back({std::string(whose) + " " + name, bytes->begin, bytes->bytes, false});
    }
  }
};

template <class Half, int BLOCKS>
simt::Report run(const simt::Launch& launch, const resident::Batch& batch, bool decides) {
  return simt::run(launch, [&] {
    if (decides) {
      resident::Kernel<Half, BLOCKS, true>(batch).run();
    } else {
      resident::Kernel<Half, BLOCKS, false>(batch).run();
    }
  });
}

template <class Half>
simt::Report run(const simt::Launch& launch, const resident::Batch& batch, bool decides) {
  switch (launch.cluster) {
    case 1:
      return run<Half, 1>(launch, batch, decides);
    case 2:
      return run<Half, 2>(launch, batch, decides);
    case 4:
      return run<Half, 4>(launch, batch, decides);
  }
  throw std::invalid_argument("clusters are of 1, 2 or 4 blocks");
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 4) return 2;
  const std::string path = argv[1];
  File file(path);
  const Bytes header = file.next(), images = file.next(), order = file.next(), given = file.next();
  const Loaded network(file), policy(file);
  const int64_t half = header.as<int64_t>()[0], size = header.as<int64_t>()[1];
  const bool planar = header.as<int64_t>()[2];
  const int samples = static_cast<int>(images.bytes / (2 * 3 * size * size));
  const bool decides = policy.weights.bytes > 0;
  const int columns = network.network().ends[2], outputs = network.network().outputs;

  std::vector<unsigned char> first;
  simt::Report report;
  for (int i = 3; i < argc; ++i) {
    Bytes results(4 * samples * outputs), decided(decides ? samples * columns : 0);
    std::fill_n(results.begin, results.bytes, 0xff);  // NaN
    std::fill_n(decided.begin, decided.bytes, 0xff);
    const resident::Batch batch{images.as<uint16_t>(),
                                {3 * size * size, planar ? size * size : 1, planar ? size : 3 * size, planar ? 1 : 3},
                                static_cast<int>(size),
                                policy.network(),
                                network.network(),
                                given.as<uint8_t>(),
                                decided.as<uint8_t>(),
                                results.as<float>(),
                                order.as<int>()};
    simt::Launch launch;
    launch.threads = resident::kThreads;
    launch.cluster = std::atoi(argv[2]);
    launch.blocks = samples * launch.cluster;
    launch.shared_bytes = resident::kSharedBytes;
    launch.seed = std::strtoull(argv[i], nullptr, 10);
    launch.buffers = {{"images", images.begin, images.bytes, false},
                      {"order", order.begin, order.bytes, false},
                      {"decisions", given.begin, given.bytes, false},
                      {"decided", decided.begin, decided.bytes, true},
                      {"results", results.begin, results.bytes, true}};
    network.add("network", launch.buffers);
    policy.add("policy", launch.buffers);
    report = half ? run<hardware::BFloat16>(launch, batch, decides) : run<hardware::Float16>(launch, batch, decides);
    if (!report.error.empty()) {
      std::printf("seed %s: %s\n", argv[i], report.error.c_str());
      return 1;
    }
    std::vector<unsigned char> all(results.begin, results.begin + results.bytes);
    all.insert(all.end(), decided.begin, decided.begin + decided.bytes);
    if (first.empty()) first = all;
    if (all != first) {
      std::printf("seed %s: other bits than seed %s\n", argv[i], argv[3]);
      return 1;
    }
  }
  std::ofstream out(path + ".out", std::ios::binary);
  out.write(reinterpret_cast<const char*>(first.data()), static_cast<std::streamsize>(first.size()));
  std::printf("{\"products\": %ld, \"copied_bytes\": %ld, \"barriers\": %ld, \"accesses\": {", long(report.products),
              long(report.copied_bytes), long(report.barriers));
  const char* separator = "";
  for (const auto& [name, accesses] : report.accesses) {
    std::printf("%s\"%s\": [%ld, %ld]", separator, name.c_str(), long(accesses.count), long(accesses.conflicts));
    separator = ", ";
  }
  std::printf("}}\n");
  return out.good() ? 0 : 1;
}
