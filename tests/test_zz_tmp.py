import os, ray


def test_ray(ray_session, s3):
    @ray.remote
    def f():
        import xmc_ray.storage as s

        s.write_bytes("s3://test/fromray", b"1")
        return os.environ["AWS_ENDPOINT_URL"]

    assert ray.get(f.remote()) == s3.endpoint
