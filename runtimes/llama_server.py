"""python -m runtimes.llama_server <file.gguf> <host> <port>: llama.cpp's server, of xllamacpp."""

import signal
import sys
from pathlib import Path


def main() -> None:
    file, host, port = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.hostnames, params.port = [host], port
    params.model_alias = {file.stem}
    params.cors_origins = ""  # else any web page could ask it
    server = xllamacpp.Server(params)  # its threads answer
    assert server.listening_address
    signal.pause()


if __name__ == "__main__":
    main()
