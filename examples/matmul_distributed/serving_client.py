"""One call of the served model: ones give -48 everywhere."""

import numpy as np

from shardserve.client import Client


def predict():
    with Client("localhost:5500", "matmul", "predict") as client:
        result = client.infer({"x": np.ones((128, 96), np.float32)})
    print(result)
    return result


if __name__ == "__main__":
    predict()
