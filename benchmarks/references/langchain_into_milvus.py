"""The usual way into a vector store: LangChain's `Milvus.add_texts` with SentenceTransformer in float32.

`python langchain_into_milvus.py FILE MILVUS_URI MODEL` prints the seconds, with the model loaded before. Runs with
LangChain on its path, which the project's own environment lacks.
"""

import json
import sys
import time
from pathlib import Path

from langchain_core.embeddings import Embeddings  # type: ignore[import-not-found]
from langchain_milvus import Milvus  # type: ignore[import-not-found]
from sentence_transformers import SentenceTransformer


class Model(Embeddings):  # type: ignore[misc]
    """As `langchain_huggingface.HuggingFaceEmbeddings`: `encode` at its usual batch size, vectors as lists."""

    def __init__(self, location: str) -> None:
        self._model = SentenceTransformer(location, device="cpu")

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        """Vectors of texts."""
        return self._model.encode(texts, show_progress_bar=False).tolist()  # type: ignore[no-any-return]

    def embed_query(self, text: str) -> list[float]:
        """Vector of one text."""
        return self.embed_documents([text])[0]


def main() -> None:
    """Load the file and say how long that took."""
    file, uri, location = sys.argv[1:]
    rows = [json.loads(line) for line in Path(file).read_text().splitlines()]
    model = Model(location)
    model.embed_query("a text, so that everything is there")
    store = Milvus(model, collection_name="langchain", connection_args={"uri": uri}, auto_id=False)
    started = time.perf_counter()
    store.add_texts(
        [row["message"] for row in rows],
        metadatas=[{"user_id": row["user_id"], "timestamp": row["timestamp"]} for row in rows],
        ids=[row["message_id"] for row in rows],
    )
    print(json.dumps({"seconds": time.perf_counter() - started}))


if __name__ == "__main__":
    main()
