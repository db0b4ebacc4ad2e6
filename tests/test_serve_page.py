"""The server's page, as a person meets it: in a real browser."""

import os
import shutil

import numpy as np
import pytest
from PIL import Image
from test_serve import PALETTE, Brightest, Pixels, serving

from resfu_jax import server as serve
from resfu_jax.export import export_model
from resfu_jax.model import SegmentationModel
from resfu_jax.serving import load_exported

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
NAMES = ("red", "green", "</script><b>blue")

# In CI there is one: .ci/run installs it.
pytestmark = pytest.mark.skipif(not CHROMIUM and "CI" not in os.environ, reason="needs Chromium")


@pytest.fixture(scope="module")
def browser():
    from selenium import webdriver

    assert CHROMIUM, "apt-get install chromium chromium-driver, as .ci/run does"
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=390,844"):
        options.add_argument(f"--{flag}")  # root has no sandbox, a container little /dev/shm
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    with webdriver.Chrome(options=options, service=service) as browser:
        yield browser


@pytest.fixture(scope="module")
def page(browser, tmp_path_factory):
    """What the page says and shows of a photo."""
    model = SegmentationModel(Pixels(), Brightest(), mean=(0, 0, 0), std=(1, 1, 1))
    path = tmp_path_factory.mktemp("page") / "model.zip"
    export_model(model, path, platforms=("cpu",), class_names=NAMES, palette=PALETTE)

    def text(selector):
        return browser.find_element("css selector", selector).text

    def choose(file):
        browser.find_element("css selector", "input[type=file]").send_keys(str(file))
        wait(lambda _: text("[role=alert]") or text("[role=status]").endswith(" s"))
        items = browser.find_elements("css selector", "li")
        return {"error": text("[role=alert]"), "legend": [item.text for item in items]}

    from selenium.webdriver.support.ui import WebDriverWait

    wait = WebDriverWait(browser, 60).until
    with serving(serve.Server(("127.0.0.1", 0), load_exported(path))) as server:
        browser.get(f"http://127.0.0.1:{server.server_port}/")
        yield choose


def shown(browser):
    """The pixels of the photo and of the labels on it, and the rectangles where they are."""
    return browser.execute_script("""
        const photo = document.querySelector("canvas");
        const labels = document.querySelector("figure img");
        const [width, height] = [labels.naturalWidth, labels.naturalHeight];
        const copy = new OffscreenCanvas(width, height).getContext("2d");
        copy.drawImage(labels, 0, 0);
        const pixels = (context) => [...context.getImageData(0, 0, width, height).data];
        const place = (element) => Object.values(element.getBoundingClientRect().toJSON());
        return {
            size: [photo.height, photo.width],
            photo: pixels(photo.getContext("2d")), labels: pixels(copy),
            places: [place(photo), place(labels)],
            opacity: getComputedStyle(labels).opacity,
            colors: [...document.querySelectorAll("li")].map((item) => item.style.cssText),
        };""")


def rgb(pixels, size):
    return np.asarray(pixels).reshape(*size, 4)[..., :3]


def test_a_photo_is_shown_with_its_classes(page, browser, tmp_path):
    photo = np.zeros((40, 60, 3), np.uint8)
    photo[:, :15, 2] = 200
    photo[:, 15:, 0] = 200
    Image.fromarray(photo).save(tmp_path / "photo.png")
    assert page(tmp_path / "photo.png") == {
        "error": "",
        "legend": ["red 75.0 %", "</script><b>blue 25.0 %"],
    }
    seen = shown(browser)
    np.testing.assert_array_equal(rgb(seen["photo"], seen["size"]), photo)
    np.testing.assert_array_equal(
        rgb(seen["labels"], seen["size"]), np.asarray(PALETTE)[photo.argmax(axis=-1)]
    )
    np.testing.assert_allclose(*seen["places"], atol=0.1)  # one upon the other
    assert seen["opacity"] == "0.5"
    assert seen["colors"] == ["--color: rgb(255, 0, 0);", "--color: rgb(0, 0, 255);"]
    assert not browser.get_log("browser")  # nor does its policy forbid the page anything


def test_photos_of_telephones_are_turned_and_reduced(page, browser, tmp_path):
    """A server takes 4 million pixels."""
    exif = Image.Exif()
    exif[0x0112] = 6
    photo = Image.new("RGB", (3000, 2000), (9, 200, 9))
    photo.paste((200, 9, 9), (0, 0, 1500, 2000))  # the upper half of what is shown
    photo.save(tmp_path / "photo.jpg", exif=exif)
    assert page(tmp_path / "photo.jpg")["legend"] == ["red 50.0 %", "green 50.0 %"]
    seen = shown(browser)
    assert seen["size"] == [1024, 682]
    np.testing.assert_allclose(*seen["places"], atol=0.1)
    assert browser.execute_script("return document.documentElement.scrollWidth <= innerWidth")
    rows = rgb(seen["labels"], seen["size"])[:, 0]
    assert (rows[:500] == PALETTE[0]).all() and (rows[-500:] == PALETTE[1]).all()


@pytest.mark.parametrize(
    "name, error",
    [
        ("text.jpg", "text.jpg: this browser cannot read it as an image"),
        ("long.png", "The server says: an image may be 16 times as long as wide"),
    ],
)
def test_errors_are_shown(page, tmp_path, name, error):
    (tmp_path / "text.jpg").write_text("no image")
    Image.new("RGB", (900, 20)).save(tmp_path / "long.png")
    assert page(tmp_path / name) == {"error": error, "legend": list(NAMES)}
