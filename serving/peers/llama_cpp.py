"""`PYTHON llama_cpp.py GGUF PORT STREAMS THREADS`: llama.cpp's own server on the model in 8 bits, until it is killed.

Needs the packages `xllamacpp` and `gguf`. Every tensor of the file is taken to Q8_0, llama.cpp's format of 8 bits, from whatever it is in.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import xllamacpp  # type: ignore[import-not-found]  # the peer's Python has it
from gguf import GGMLQuantizationType, GGUFReader, GGUFValueType, GGUFWriter
from gguf.quants import dequantize, quantize

TOKENS_PER_STREAM = 512
COMPUTED = ("GGUF.", "general.architecture", "general.quantization_version", "general.file_type")
"""Fields that the writer sets itself."""


def to_8_bits(source: Path, target: Path) -> None:
    """Writes the model in `source` with each matrix in Q8_0 and each vector in fp32."""
    reader = GGUFReader(source)
    writer = GGUFWriter(target, bytes(reader.fields["general.architecture"].parts[-1]).decode())
    for name, field in reader.fields.items():
        if not name.startswith(COMPUTED):
            kind = field.types[-1] if field.types[0] == GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], kind)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        kind = GGMLQuantizationType.Q8_0 if values.ndim == 2 else GGMLQuantizationType.F32
        writer.add_tensor(tensor.name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main(source: Path, port: int, num_streams: int, num_threads: int) -> None:
    """Serves until killed."""
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "q8_0.gguf"
        to_8_bits(source, model)
        params = xllamacpp.CommonParams()
        params.model.path = str(model)
        params.port = port
        params.n_parallel = num_streams
        params.n_ctx = num_streams * TOKENS_PER_STREAM  # llama.cpp divides it among the streams
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = num_threads
        server = xllamacpp.Server(params)
        print(server.listening_address, file=sys.stderr, flush=True)
        time.sleep(1e9)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *(int(each) for each in sys.argv[2:5]))
