"""Other inference libraries: a module as an ONNX file, and such a file as a function of tensors."""

import io
import logging
import warnings

import torch


def export_module(module, *inputs):
    """Export a module as an ONNX file (bytes), for inputs of these shapes."""
    file = io.BytesIO()
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            torch.onnx.export(module, inputs, file, dynamo=True, verbose=False)
    finally:
        logger.setLevel(level)
    return file.getvalue()


def open_in_onnx_runtime(content, threads):
    """Turn an ONNX file (bytes) into a function from tensors to a list of tensors, with all graph optimisations."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL
    # Its threads may spin while it runs, but not into the neighbour's turn.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [node.name for node in session.get_inputs()]

    def run(*tensors):
        given = {name: tensor.numpy() for name, tensor in zip(names, tensors, strict=True)}
        return [torch.from_numpy(output) for output in session.run(None, given)]

    return run


def open_in_openvino(content, threads):
    """:func:`open_in_onnx_runtime` with OpenVINO, set for latency, float32."""
    import openvino

    core = openvino.Core()
    settings = {
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
        "INFERENCE_PRECISION_HINT": "f32",  # some CPUs would take bfloat16 by themselves
    }
    network = core.compile_model(core.read_model(io.BytesIO(content)), "CPU", settings)
    request = network.create_infer_request()

    def run(*tensors):
        found = request.infer([tensor.numpy() for tensor in tensors], share_inputs=True)
        return [torch.from_numpy(found[output]) for output in network.outputs]

    return run
