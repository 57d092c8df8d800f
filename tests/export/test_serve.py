"""A served student answers as `predict`, many clients at once, and refuses what it cannot use without ending."""

from __future__ import annotations

import gzip
import http.client
import io
import json
import os
import threading
from concurrent.futures import ThreadPoolExecutor

import nibabel as nib
import numpy as np
import pytest
from helpers import needs, shared_data
from own_data import dicom_picture
from PIL import Image

from amkd_monai.export.predict import Predictor
from amkd_monai.files.pictures import read_picture, write_png
from amkd_monai.files.volumes import read_volume

CLIENTS, REQUESTS = 8, int(os.environ.get("AMKD_REQUESTS", "64"))


@pytest.fixture(scope="module")
def served(exported):
    """Serve a task's student by Uvicorn on a free port; return the port and the folder of the export."""
    uvicorn = needs("uvicorn")
    needs("python_multipart")
    from amkd_monai.export.serve import LOOPBACK, application

    running = {}

    def get(task):
        if task not in running:
            dist = exported(task)[0] / "dist" / task
            app = application(Predictor(dist, False, 1), 3_000_000, LOOPBACK)
            server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="warning"))
            thread = threading.Thread(target=server.run, daemon=True)
            thread.start()
            while not server.started:
                assert thread.is_alive()
                thread.join(0.05)
            running[task] = server.servers[0].sockets[0].getsockname()[1], dist, server, thread
        return running[task][:2]

    yield get
    for *_, server, thread in running.values():
        server.should_exit = True
        thread.join(30)


def ask(port, method, path, body=b"", **headers):
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=300)
    try:
        connection.request(method, path, body, headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers
    finally:
        connection.close()


def post(port, content, name="x.png"):
    head = f'--edge\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n\r\n'.encode()
    kind = "multipart/form-data; boundary=edge"
    return ask(port, "POST", "/predict", head + content + b"\r\n--edge--\r\n", **{"Content-Type": kind})


def test_many_clients_get_the_masks_of_predict(served):
    port, dist = served("kvasir_seg")
    files = sorted(shared_data("Kvasir-SEG", "images").glob("*.jpg"))[:4]
    predictor = Predictor(dist, False, 1)
    expected = [predictor.mask(read_picture(file).transpose(2, 0, 1).astype(np.float32)) for file in files]
    contents = [file.read_bytes() for file in files]

    def one(number):
        status, body, headers = post(port, contents[number % 4], "../../x.png")
        assert (status, headers["content-type"]) == (200, "image/png"), body
        return np.array_equal(np.asarray(Image.open(io.BytesIO(body))) > 0, expected[number % 4] > 0)

    with ThreadPoolExecutor(CLIENTS) as clients:
        answers = list(clients.map(one, range(REQUESTS)))
    assert len(answers) == REQUESTS and all(answers)


def test_a_volume_and_classes_are_answered(served, tmp_path):
    port, dist = served("msd_heart")
    source = sorted(shared_data("MSD-Heart").rglob("imagesTr/la_*.nii.gz"))[0]
    image = nib.load(source)
    small = nib.Nifti1Image(np.asanyarray(image.dataobj)[::4, ::4, ::4], image.affine @ np.diag([4, 4, 4, 1]))
    nib.save(small, tmp_path / "small.nii.gz")
    status, body, _ = post(port, (tmp_path / "small.nii.gz").read_bytes(), "small.nii.gz")
    assert status == 200
    mask = nib.Nifti1Image.from_bytes(gzip.decompress(body))
    volume, grid = read_volume(tmp_path / "small.nii.gz")
    np.testing.assert_array_equal(mask.dataobj, Predictor(dist, False, 1).mask(volume[None], grid))
    np.testing.assert_allclose(mask.affine, small.affine)
    header = small.header.copy()
    header.set_data_shape((500, 500, 500))
    bomb = gzip.compress(header.binaryblock + bytes(80_000_000))
    status, body, _ = post(port, bomb, "bomb.nii.gz")
    assert status == 413 and b"unpacks to more" in body
    port, dist = served("aptos2019")
    file = sorted(shared_data("APTOS2019_standin_IDRiD", "train_images").iterdir())[0]
    status, body, _ = post(port, file.read_bytes())
    found = json.loads(body)
    expected = Predictor(dist, False, 1).probabilities(read_picture(file).transpose(2, 0, 1).astype(np.float32))[0]
    assert status == 200 and list(found["probabilities"].values()) == pytest.approx(expected.tolist(), abs=1e-5)
    assert found["class"] == list(found["probabilities"])[int(expected.argmax())]


def test_a_dicom_picture_is_answered_as_predict_reads_it(served, tmp_path):
    port, dist = served("kvasir_seg")
    grey = np.asarray(Image.open(sorted(shared_data("Kvasir-SEG", "images").glob("*.jpg"))[0]).convert("L"))
    values, window = grey.astype(np.uint16) * 8 + 300, {"WindowCenter": "1200", "WindowWidth": "1500"}
    how = {"PhotometricInterpretation": "MONOCHROME1", "BitsStored": 12, "HighBit": 11, **window}
    file, predictor = dicom_picture(tmp_path / "x.dcm", values, **how), Predictor(dist, False, 1)
    content = file.read_bytes()
    for sent in (content, b"\x89PNG" + content[4:], b"II*\0" + content[4:]):  # the first 128 bytes may be anything
        status, body, _ = post(port, sent, "x.png")
        assert status == 200, body
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(body))) > 0, predictor.answer(file) > 0)
    refused = {
        "states no window": (values, {}),
        "several frames": (values[: len(values) // 2 * 2], {**window, "NumberOfFrames": 2, "Rows": len(values) // 2}),
        "SIGMOID": (values, {**window, "VOILUTFunction": "SIGMOID"}),
    }
    for word, (array, tags) in refused.items():
        status, body, _ = post(port, dicom_picture(tmp_path / "y.dcm", array, **tags).read_bytes())
        detail = json.loads(body)["detail"]
        assert status == 422 and word in detail and detail.count(". ") == 0 and "/tmp" not in detail, detail
    status, body, _ = post(port, content[:600])
    assert status == 422 and b"cannot be read" in body and b"/tmp" not in body
    status, body, _ = post(served("msd_heart")[0], content)
    assert status == 415 and b"NIfTI" in body


def test_what_cannot_be_used_is_refused_in_one_sentence_and_serving_goes_on(served, tmp_path):
    port, _ = served("kvasir_seg")
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64)).save(buffer, "PNG")
    write_png(tmp_path / "x_overlay.png", np.random.default_rng(0).integers(0, 255, (64, 64, 3)).astype(np.uint8))
    good = sorted(shared_data("Kvasir-SEG", "images").glob("*.jpg"))[0].read_bytes()
    kind = {"Content-Type": "multipart/form-data; boundary=edge"}
    for content, code, word in (
        (b"%!PS-Adobe hello", 415, b"pictures"),
        (buffer.getvalue(), 422, b"levels"),
        ((tmp_path / "x_overlay.png").read_bytes(), 422, b"prediction"),
        (good[:3000], 422, b"cannot be read"),
        (b"", 415, b"pictures"),
    ):
        status, body, _ = post(port, content)
        assert (
            status == code
            and word in body
            and b"/tmp" not in body
            and b"upload" not in body.replace(b"The upload", b"")
        )
    for body in (b"", b"file=abc", b'--edge\r\nContent-Disposition: form-data; name="file"\r\n\r\nabc\r\n--edge--\r\n'):
        status, answer, _ = ask(port, "POST", "/predict", body, **kind)
        detail = json.loads(answer)["detail"]
        assert status in (400, 422) and isinstance(detail, str) and detail.count(". ") == 0, detail
    part = b'--edge\r\nContent-Disposition: form-data; name="file"; filename="x.png"\r\n\r\n' + good + b"\r\n"
    both = ask(port, "POST", "/predict", part * 2 + b"--edge--\r\n", **kind)
    assert both[0] == 422 and b"2 files" in both[1]
    stated = ask(port, "POST", "/predict", b"", **{"Content-Length": "2000000000"})
    assert stated[0] == 413 and b"larger" in stated[1]

    def endless():
        yield b'--edge\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
        for _ in range(40):
            yield bytes(100_000)

    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    try:
        connection.request("POST", "/predict", endless(), kind, encode_chunked=True)
        assert connection.getresponse().status == 411, "a length that is not stated could be any"
    except (BrokenPipeError, ConnectionResetError):
        pass  # refused before all was sent
    finally:
        connection.close()
    assert ask(port, "GET", "/model", Host="elsewhere.example")[0] == 400
    assert ask(port, "GET", "/page/../configs/predict.json")[0] == 404
    assert b"NOT FOR CLINICAL USE" in ask(port, "GET", "/model")[1]
    assert b'"/predict"' in ask(port, "GET", "/openapi.json")[1]
    assert ask(port, "GET", "/")[2]["location"] == "/openapi.json", "this export has no page"
    for name in ("docs", "redoc"):
        assert ask(port, "GET", f"/{name}")[0] == 404, "they would load scripts from the internet"
    assert post(port, good)[0] == 200
