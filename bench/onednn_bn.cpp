// Batch normalization by the primitive of oneDNN 3 behind a C interface for ctypes, in plain, channels-last and blocked
// memory. `bind` lets a plain or channels-last object work on the caller's array; other memory belongs to the object,
// and `set` and `get` reorder from and to plain (N, C, spatial) arrays, outside of what is timed.
#include <dnnl.hpp>

#include <map>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

using namespace dnnl;
using tag = memory::format_tag;
using args = std::unordered_map<int, memory>;

namespace {

enum op_t { inference, training, backward };
enum format_t { nchw, nhwc, blocked16, blocked8 };
enum how_t { no_activation, by_flag, by_post_op, by_own_primitive }; // the flag is ReLU's alone
enum activation_t { relu, silu };

std::string last_error;

const std::map<std::string, int> arguments = {{"x", DNNL_ARG_SRC},
                                              {"y", DNNL_ARG_DST},
                                              {"residual", DNNL_ARG_SRC_1},
                                              {"weight", DNNL_ARG_SCALE},
                                              {"bias", DNNL_ARG_SHIFT},
                                              {"mean", DNNL_ARG_MEAN},
                                              {"var", DNNL_ARG_VARIANCE},
                                              {"grad_output", DNNL_ARG_DIFF_DST},
                                              {"grad_input", DNNL_ARG_DIFF_SRC},
                                              {"grad_weight", DNNL_ARG_DIFF_SCALE},
                                              {"grad_bias", DNNL_ARG_DIFF_SHIFT}};

tag data_tag(int format, size_t ndims) {
    static const tag tags[4][4] = {{tag::nc, tag::ncw, tag::nchw, tag::ncdhw},
                                   {tag::nc, tag::nwc, tag::nhwc, tag::ndhwc},
                                   {tag::nc, tag::nCw16c, tag::nChw16c, tag::nCdhw16c},
                                   {tag::nc, tag::nCw8c, tag::nChw8c, tag::nCdhw8c}};
    return tags[format][ndims - 2];
}

// One for all objects: of SYCL they are dear.
const engine &cpu_engine() {
    static const engine cpu(engine::kind::cpu, 0);
    return cpu;
}
const stream &cpu_queue() {
    static const stream queue(cpu_engine());
    return queue;
}

struct batch_norm {
    engine cpu = cpu_engine();
    stream queue = cpu_queue();
    memory::desc plain, channels;
    args mem;
    std::vector<std::pair<primitive, args>> before, steps; // `before` runs once, `steps` are what is timed
    std::string implementation;

    batch_norm(op_t op, const memory::dims &dims, memory::data_type type, int format, how_t how,
               activation_t activation, bool residual, float eps)
        : plain(dims, type, data_tag(nchw, dims.size())), channels({dims[1]}, memory::data_type::f32, tag::a) {
        const memory::desc data(dims, type, data_tag(format, dims.size()));
        auto flags = normalization_flags::use_scale | normalization_flags::use_shift;
        if (op == inference)
            flags = flags | normalization_flags::use_global_stats;
        if (how == by_flag)
            flags = flags | normalization_flags::fuse_norm_relu;
        const auto function = activation == silu ? algorithm::eltwise_swish : algorithm::eltwise_relu;
        const float alpha = activation == silu ? 1.f : 0.f;
        primitive_attr activated;
        post_ops ops;
        ops.append_eltwise(function, alpha, 0.f);
        activated.set_post_ops(ops);

        using forward_t = batch_normalization_forward;
        const auto kind = op == inference ? prop_kind::forward_inference : prop_kind::forward_training;
        const forward_t::primitive_desc forward(cpu, kind, data, data, eps, flags,
                                                how == by_post_op && !residual ? activated : primitive_attr());
        implementation = forward.impl_info_str();
        // What the caller will bind has no memory of its own.
        const auto bound = [&] { return format < blocked16 ? memory(data, cpu, DNNL_MEMORY_NONE) : memory(data, cpu); };
        mem[DNNL_ARG_SRC] = bound();
        mem[DNNL_ARG_DST] = op == backward ? memory(data, cpu) : bound();
        for (int arg : {DNNL_ARG_SCALE, DNNL_ARG_SHIFT, DNNL_ARG_MEAN, DNNL_ARG_VARIANCE})
            mem[arg] = memory(channels, cpu);
        if (forward.workspace_desc().get_size())
            mem[DNNL_ARG_WORKSPACE] = memory(forward.workspace_desc(), cpu);
        (op == backward ? before : steps).emplace_back(forward_t(forward), mem);

        if (op != backward) {
            const memory y = mem[DNNL_ARG_DST];
            if (residual) {
                mem[DNNL_ARG_SRC_1] = bound();
                const binary::primitive_desc add(cpu, algorithm::binary_add, data, data, data,
                                                 how == no_activation ? primitive_attr() : activated);
                steps.push_back(
                    {binary(add), {{DNNL_ARG_SRC_0, y}, {DNNL_ARG_SRC_1, mem[DNNL_ARG_SRC_1]}, {DNNL_ARG_DST, y}}});
            } else if (how == by_own_primitive) {
                const eltwise_forward::primitive_desc after(cpu, kind, function, data, data, alpha, 0.f);
                steps.push_back({eltwise_forward(after), {{DNNL_ARG_SRC, y}, {DNNL_ARG_DST, y}}});
            }
            return;
        }

        // The forward runs before, for the statistics, y and the workspace that the backward reads.
        for (int arg : {DNNL_ARG_DIFF_DST, DNNL_ARG_DIFF_SRC})
            mem[arg] = bound();
        for (int arg : {DNNL_ARG_DIFF_SCALE, DNNL_ARG_DIFF_SHIFT})
            mem[arg] = memory(channels, cpu);
        args bn_args = mem;
        for (int arg : {DNNL_ARG_DST, DNNL_ARG_SHIFT}) // not read here, and an error to oneDNN 3.2
            bn_args.erase(arg);
        if (how == by_own_primitive) {
            bn_args[DNNL_ARG_DIFF_DST] = memory(data, cpu);
            const auto alg = algorithm::eltwise_relu_use_dst_for_bwd;
            const eltwise_forward::primitive_desc hint(cpu, prop_kind::forward_training, alg, data, data, 0.f, 0.f);
            const eltwise_backward::primitive_desc mask(cpu, alg, data, data, data, 0.f, 0.f, hint);
            before.push_back(
                {eltwise_forward(hint), {{DNNL_ARG_SRC, mem[DNNL_ARG_DST]}, {DNNL_ARG_DST, mem[DNNL_ARG_DST]}}});
            steps.push_back({eltwise_backward(mask),
                             {{DNNL_ARG_DST, mem[DNNL_ARG_DST]},
                              {DNNL_ARG_DIFF_DST, mem[DNNL_ARG_DIFF_DST]},
                              {DNNL_ARG_DIFF_SRC, bn_args[DNNL_ARG_DIFF_DST]}}});
        }
        const batch_normalization_backward::primitive_desc desc(cpu, prop_kind::backward, data, data, data, eps, flags,
                                                                forward);
        implementation = desc.impl_info_str();
        steps.emplace_back(batch_normalization_backward(desc), bn_args);
    }

    void reorder_between(memory from, memory to) {
        reorder(from, to).execute(queue, from, to);
        queue.wait();
    }
    memory user(const char *name, void *values) {
        const bool per_channel = mem.at(arguments.at(name)).get_desc().get_dims().size() == 1;
        return memory(per_channel ? channels : plain, cpu, values);
    }
    void run(std::vector<std::pair<primitive, args>> &list) {
        for (auto &step : list)
            step.first.execute(queue, step.second);
        queue.wait();
    }
};

template <typename F> int guarded(F f) {
    try {
        f();
        return 0;
    } catch (const std::exception &e) {
        last_error = e.what();
        return 1;
    }
}

} // namespace

extern "C" {

const char *onednn_version() {
    static const auto *v = dnnl_version();
    static const std::string text =
        std::to_string(v->major) + "." + std::to_string(v->minor) + "." + std::to_string(v->patch);
    return text.c_str();
}

int onednn_probe() {
    return guarded([] { cpu_engine(); });
}

const char *onednn_error() { return last_error.c_str(); }

batch_norm *onednn_create(int op, int ndims, const int64_t *dims, int type, int format, int how, int activation,
                          int residual, float eps) {
    static const memory::data_type types[] = {memory::data_type::f32, memory::data_type::bf16, memory::data_type::f16};
    batch_norm *bn = nullptr;
    guarded([&] {
        bn = new batch_norm(op_t(op), memory::dims(dims, dims + ndims), types[type], format, how_t(how),
                            activation_t(activation), residual, eps);
    });
    return bn;
}

const char *onednn_implementation(const batch_norm *bn) { return bn->implementation.c_str(); }
int onednn_bind(batch_norm *bn, const char *name, void *values) {
    return guarded([&] { bn->mem.at(arguments.at(name)).set_data_handle(values); });
}
int onednn_set(batch_norm *bn, const char *name, void *values) {
    return guarded([&] { bn->reorder_between(bn->user(name, values), bn->mem.at(arguments.at(name))); });
}
int onednn_get(batch_norm *bn, const char *name, void *values) {
    return guarded([&] { bn->reorder_between(bn->mem.at(arguments.at(name)), bn->user(name, values)); });
}
int onednn_run_before(batch_norm *bn) {
    return guarded([&] { bn->run(bn->before); });
}
int onednn_run(batch_norm *bn) {
    return guarded([&] { bn->run(bn->steps); });
}
void onednn_destroy(batch_norm *bn) { delete bn; }
}
