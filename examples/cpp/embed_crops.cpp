// Embeds single-cell crops with a model written by `cellfast export --format torchscript`: raw pixels in, a float32 .npy out.
//
// The pixels are N·C·S·S values of uint8 or uint16 in one block: a raw file, the block inside a crop store (its place is told by
// `cellfast info SCREEN --json`), or, where the program was built with HDF5, a crop store as it is. See README.md for building.

#include <ATen/Parallel.h>
#include <torch/script.h>

#ifdef CELLFAST_WITH_HDF5
#include <hdf5.h>
#endif

#include <algorithm>
#include <array>
#include <charconv>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <filesystem>
#include <fstream>
#include <iostream>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

using Error = std::runtime_error;

constexpr const char* kUsage =
    "usage: embed_crops MODEL.ts PIXELS OUT.npy --shape N,C,S,S --dtype uint16|uint8 [--offset BYTES]\n"
#ifdef CELLFAST_WITH_HDF5
    "       embed_crops MODEL.ts PLATE.h5 OUT.npy\n"
#endif
    "options:\n"
    "  --shape N,C,S,S    cells, channels, rows, columns of the pixels\n"
    "  --dtype TYPE       uint16 (little-endian) or uint8\n"
    "  --offset BYTES     where the pixels begin in the file (default 0)\n"
    "  --low A,B,C        pixel value that becomes 0, per channel; only for models with scaling per plate\n"
    "  --high A,B,C       pixel value that becomes 1, per channel; only for models with scaling per plate\n"
    "  --batch-size B     crops per minibatch (default 256)\n"
    "  --device NAME      cpu (default), cuda or cuda:1\n"
    "  --threads T        CPU threads (default: libtorch's choice)\n";

struct Options {
  std::string model, pixels, out;
  std::vector<int64_t> shape;
  std::string dtype;
  int64_t offset = 0;
  std::vector<double> low, high;
  int64_t batch_size = 256;
  std::string device = "cpu";
  int threads = 0;
};

template <typename T>
std::vector<T> parse_list(const std::string& text, const std::string& option) {
  std::vector<T> values;
  std::stringstream stream(text);
  for (std::string item; std::getline(stream, item, ',');) {
    std::stringstream one(item);
    T value{};
    if (!(one >> value) || one.peek() != std::char_traits<char>::eof())
      throw Error(option + " expects numbers separated by commas, got '" + text + "'");
    values.push_back(value);
  }
  if (values.empty()) throw Error(option + " expects numbers separated by commas, got nothing");
  return values;
}

int64_t parse_whole(const std::string& text, const std::string& option, int64_t least) {
  int64_t value = 0;
  const char* end = text.data() + text.size();
  auto [rest, problem] = std::from_chars(text.data(), end, value);
  if (problem != std::errc() || rest != end || value < least)
    throw Error(option + " expects a whole number of at least " + std::to_string(least) + ", got '" + text + "'");
  return value;
}

Options parse(int argc, char** argv) {
  Options options;
  std::vector<std::string> places;
  for (int i = 1; i < argc; ++i) {
    const std::string name = argv[i];
    if (name.rfind("--", 0) != 0) {
      places.push_back(name);
      continue;
    }
    if (i + 1 >= argc) throw Error(name + " needs a value");
    const std::string value = argv[++i];
    if (name == "--shape") options.shape = parse_list<int64_t>(value, name);
    else if (name == "--dtype") options.dtype = value;
    else if (name == "--offset") options.offset = parse_whole(value, name, 0);
    else if (name == "--low") options.low = parse_list<double>(value, name);
    else if (name == "--high") options.high = parse_list<double>(value, name);
    else if (name == "--batch-size") options.batch_size = parse_whole(value, name, 1);
    else if (name == "--device") options.device = value;
    else if (name == "--threads") options.threads = static_cast<int>(parse_whole(value, name, 1));
    else throw Error("unknown option " + name);
  }
  if (places.size() != 3) throw Error("expected MODEL.ts, PIXELS and OUT.npy, got " + std::to_string(places.size()) + " names");
  options.model = places[0], options.pixels = places[1], options.out = places[2];
  return options;
}

// What the pixels are, and where they lie.
struct Pixels {
  std::string path;
  int64_t offset = 0;
  std::array<int64_t, 4> shape{};
  bool wide = true;  // uint16, else uint8
  std::vector<std::string> channels;  // empty: the source does not say
  std::vector<double> low, high;

  int64_t bytes_per_crop() const { return shape[1] * shape[2] * shape[3] * (wide ? 2 : 1); }
};

#ifdef CELLFAST_WITH_HDF5

class Handle {
 public:
  Handle(hid_t id, herr_t (*close)(hid_t), const std::string& what) : id_(id), close_(close) {
    if (id_ < 0) throw Error(what);
  }
  ~Handle() { close_(id_); }
  Handle(const Handle&) = delete;
  Handle& operator=(const Handle&) = delete;
  operator hid_t() const { return id_; }

 private:
  hid_t id_;
  herr_t (*close_)(hid_t);
};

std::vector<double> read_doubles(hid_t file, const std::string& name, size_t count) {
  Handle set(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose, "no dataset " + name);
  Handle space(H5Dget_space(set), H5Sclose, name);
  if (H5Sget_simple_extent_npoints(space) != static_cast<hssize_t>(count)) throw Error(name + " has another length than the channels");
  std::vector<double> values(count);
  if (H5Dread(set, H5T_NATIVE_DOUBLE, H5S_ALL, H5S_ALL, H5P_DEFAULT, values.data()) < 0) throw Error(name + " cannot be read");
  return values;
}

std::vector<std::string> read_names(hid_t file, const std::string& name) {
  Handle set(H5Dopen2(file, name.c_str(), H5P_DEFAULT), H5Dclose, "no dataset " + name);
  Handle space(H5Dget_space(set), H5Sclose, name);
  Handle stored(H5Dget_type(set), H5Tclose, name);
  const auto count = static_cast<size_t>(H5Sget_simple_extent_npoints(space));
  std::vector<std::string> names(count);
  if (H5Tis_variable_str(stored) > 0) {
    Handle type(H5Tcopy(H5T_C_S1), H5Tclose, name);
    H5Tset_size(type, H5T_VARIABLE), H5Tset_cset(type, H5Tget_cset(stored));
    std::vector<char*> text(count, nullptr);
    if (H5Dread(set, type, H5S_ALL, H5S_ALL, H5P_DEFAULT, text.data()) < 0) throw Error(name + " cannot be read");
    for (size_t i = 0; i < count; ++i) names[i] = text[i] ? text[i] : "";
    H5Dvlen_reclaim(type, space, H5P_DEFAULT, text.data());
  } else {
    const size_t width = H5Tget_size(stored);
    std::vector<char> text(count * width);
    if (H5Dread(set, stored, H5S_ALL, H5S_ALL, H5P_DEFAULT, text.data()) < 0) throw Error(name + " cannot be read");
    for (size_t i = 0; i < count; ++i) names[i] = std::string(&text[i * width], strnlen(&text[i * width], width));
  }
  return names;
}

Pixels open_store(const std::string& path) {
  H5Eset_auto2(H5E_DEFAULT, nullptr, nullptr);
  Handle file(H5Fopen(path.c_str(), H5F_ACC_RDONLY, H5P_DEFAULT), H5Fclose, path + " cannot be opened as HDF5");
  Handle set(H5Dopen2(file, "/crops", H5P_DEFAULT), H5Dclose, path + " has no /crops: not a crop store");
  Handle space(H5Dget_space(set), H5Sclose, path);
  Handle type(H5Dget_type(set), H5Tclose, path);
  Handle plan(H5Dget_create_plist(set), H5Pclose, path);
  hsize_t sizes[4];
  if (H5Sget_simple_extent_ndims(space) != 4) throw Error(path + ": /crops must have shape [N, C, S, S]");
  H5Sget_simple_extent_dims(space, sizes, nullptr);
  // The pixels of a crop store are one block, so they are read as a file; anything else would need HDF5's own reading, and a
  // dataset that points to other files is refused.
  if (H5Pget_layout(plan) != H5D_CONTIGUOUS || H5Pget_external_count(plan) != 0)
    throw Error(path + ": /crops must be one contiguous block inside the file");
  Pixels pixels;
  pixels.path = path;
  std::copy(sizes, sizes + 4, pixels.shape.begin());
  if (H5Tequal(type, H5T_STD_U16LE) > 0) pixels.wide = true;
  else if (H5Tequal(type, H5T_STD_U8LE) > 0) pixels.wide = false;
  else throw Error(path + ": /crops must be uint16 or uint8");
  if (sizes[0] > 0) {
    const haddr_t offset = H5Dget_offset(set);
    if (offset == HADDR_UNDEF) throw Error(path + ": the pixels were never written");
    pixels.offset = static_cast<int64_t>(offset);
  }
  pixels.channels = read_names(file, "/channels/name");
  pixels.low = read_doubles(file, "/channels/scale_low", sizes[1]);
  pixels.high = read_doubles(file, "/channels/scale_high", sizes[1]);
  return pixels;
}

#endif

Pixels open_pixels(const Options& options) {
#ifdef CELLFAST_WITH_HDF5
  if (options.shape.empty() && H5Fis_hdf5(options.pixels.c_str()) > 0) return open_store(options.pixels);
#endif
  if (options.shape.size() != 4) throw Error("--shape expects N,C,S,S: cells, channels, rows, columns");
  Pixels pixels;
  pixels.path = options.pixels;
  pixels.offset = options.offset;
  std::copy(options.shape.begin(), options.shape.end(), pixels.shape.begin());
  for (int i = 0; i < 4; ++i)
    if (pixels.shape[i] < (i ? 1 : 0) || pixels.shape[i] > (int64_t(1) << 40)) throw Error("--shape has a size out of range");
  if (options.dtype != "uint16" && options.dtype != "uint8")
    throw Error("--dtype must be uint16 or uint8, got '" + options.dtype + "'");
  pixels.wide = options.dtype == "uint16";
  return pixels;
}

std::string join(const std::vector<std::string>& names) {
  std::string text;
  for (const auto& name : names) text += (text.empty() ? "" : ", ") + name;
  return text;
}

// The model says what it takes: compare before the first crop, and name both sides.
void check(const torch::jit::Module& model, const Pixels& pixels, const Options& options) {
  if (!model.hasattr("channel_names") || !model.hasattr("crop_size"))
    throw Error(options.model + " is not a file of `cellfast export --format torchscript`");
  std::vector<std::string> channels;
  for (const auto& name : model.attr("channel_names").toListRef()) channels.push_back(name.toStringRef());
  const int64_t size = model.attr("crop_size").toInt(), bits = model.attr("bits").toInt();
  if (pixels.shape[1] != static_cast<int64_t>(channels.size()) || pixels.shape[2] != size || pixels.shape[3] != size)
    throw Error("the model takes " + std::to_string(channels.size()) + " channels (" + join(channels) + ") of " + std::to_string(size) +
                " x " + std::to_string(size) + " px, the crops are " + std::to_string(pixels.shape[1]) + " channels of " +
                std::to_string(pixels.shape[2]) + " x " + std::to_string(pixels.shape[3]) + " px");
  if (bits != (pixels.wide ? 16 : 8))
    throw Error("the model takes " + std::to_string(bits) + "-bit pixels, the crops have " + (pixels.wide ? "16" : "8"));
  if (!pixels.channels.empty() && pixels.channels != channels)
    throw Error("the model takes the channels " + join(channels) + ", the crop store has " + join(pixels.channels));
  std::error_code problem;
  const auto found = std::filesystem::file_size(pixels.path, problem);
  if (problem) throw Error(pixels.path + " cannot be read: " + problem.message());
  const auto needed = static_cast<long double>(pixels.offset) + static_cast<long double>(pixels.shape[0]) * pixels.bytes_per_crop();
  if (static_cast<long double>(found) < needed)
    throw Error(pixels.path + " has " + std::to_string(found) + " bytes, the crops end at byte " +
                std::to_string(static_cast<int64_t>(needed)));
}

// NumPy's format 1.0: the header is padded to a multiple of 64 bytes.
void write_npy_header(std::ofstream& file, int64_t rows, int64_t columns) {
  std::string header = "{'descr': '<f4', 'fortran_order': False, 'shape': (" + std::to_string(rows) + ", " + std::to_string(columns) + "), }";
  header.append(63 - (10 + header.size()) % 64, ' ').push_back('\n');
  const char start[] = {'\x93', 'N', 'U', 'M', 'P', 'Y', 1, 0, static_cast<char>(header.size() & 0xff), static_cast<char>(header.size() >> 8)};
  file.write(start, sizeof start);
  file.write(header.data(), static_cast<std::streamsize>(header.size()));
}

torch::Tensor scaling(const std::vector<double>& given, const std::vector<double>& stored, int64_t channels, const std::string& option) {
  const auto& values = given.empty() ? stored : given;
  if (static_cast<int64_t>(values.size()) != channels)
    throw Error("this model is scaled per plate: " + option + " expects one value per channel (" + std::to_string(channels) + "), got " +
                std::to_string(values.size()));
  return torch::tensor(values, torch::kFloat64).to(torch::kFloat32);
}

void embed(const Options& options, const std::filesystem::path& partial) {
  const torch::Device device(options.device);
  if (options.threads > 0) at::set_num_threads(options.threads);
  c10::InferenceMode inference;
  torch::jit::Module model = torch::jit::load(options.model, device);
  model.eval();
  const Pixels pixels = open_pixels(options);
  check(model, pixels, options);
  const auto [count, channels, height, width] = pixels.shape;

  std::vector<torch::IValue> inputs(1);
  if (model.attr("scaling").toStringRef() == "plate") {
    inputs.emplace_back(scaling(options.low, pixels.low, channels, "--low").to(device));
    inputs.emplace_back(scaling(options.high, pixels.high, channels, "--high").to(device));
  } else if (!options.low.empty() || !options.high.empty()) {
    throw Error("this model has its scaling inside: --low and --high are for models with scaling per plate");
  }
  // 0: any number. A program of a fixed minibatch gets full ones, the last one filled up with zeros.
  const int64_t fixed = model.attr("batch_size").toInt();
  const int64_t step = fixed > 0 ? fixed : std::min<int64_t>(options.batch_size, std::max<int64_t>(count, 1));
  const int64_t columns = static_cast<int64_t>(model.attr("feature_names").toListRef().size());

  std::ifstream source(pixels.path, std::ios::binary);
  if (!source.seekg(pixels.offset)) throw Error(pixels.path + " cannot be read");
  std::ofstream out(partial, std::ios::binary);
  write_npy_header(out, count, columns);
  torch::Tensor minibatch = torch::zeros({step, channels, height, width}, pixels.wide ? torch::kUInt16 : torch::kUInt8);
  for (int64_t start = 0; start < count; start += step) {
    const int64_t here = std::min(step, count - start);
    if (!source.read(static_cast<char*>(minibatch.data_ptr()), here * pixels.bytes_per_crop()))
      throw Error(pixels.path + " ended early: its length changed while it was read");
    inputs[0] = (fixed > 0 ? minibatch : minibatch.narrow(0, 0, here)).to(device);
    const torch::Tensor features = model.forward(inputs).toTensor().narrow(0, 0, here).to(torch::kCPU).contiguous();
    if (features.size(1) != columns || features.scalar_type() != torch::kFloat32) throw Error("the model gave no float32 [B, F] features");
    const float* values = features.data_ptr<float>();
    if (!std::all_of(values, values + features.numel(), [](float v) { return std::isfinite(v); }))
      throw Error("the model gives features that are not finite");
    if (!out.write(reinterpret_cast<const char*>(values), static_cast<std::streamsize>(features.nbytes())))
      throw Error(options.out + " cannot be written: is the disk full?");
  }
  out.close();
  if (!out) throw Error(options.out + " cannot be written: is the disk full, does the folder exist?");
  std::filesystem::rename(partial, options.out);
  std::cout << options.out << ": " << count << " cells, " << columns << " features\n";
}

}  // namespace

int main(int argc, char** argv) {
  if (argc == 2 && (std::string(argv[1]) == "--help" || std::string(argv[1]) == "-h")) {
    std::cout << kUsage;
    return 0;
  }
  Options options;
  try {
    options = parse(argc, argv);
  } catch (const std::exception& error) {
    std::cerr << "embed_crops: " << error.what() << "\n" << kUsage;
    return 2;
  }
  // The result appears under its name only when it is whole.
  const std::filesystem::path partial = options.out + ".partial";
  try {
    embed(options, partial);
    return 0;
  } catch (const c10::Error& error) {
    std::cerr << "embed_crops: " << error.what_without_backtrace() << "\n";
  } catch (const std::exception& error) {
    std::cerr << "embed_crops: " << error.what() << "\n";
  }
  std::error_code ignored;
  std::filesystem::remove(partial, ignored);
  return 1;
}
