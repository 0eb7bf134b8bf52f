import time, os, threading
def test_try(s3, tmp_path, monkeypatch):
    from ray_merge.storage import retry
    from ray_merge.storage.store import open_store
    real=retry.is_transient
    import ray_merge.storage.remote as r
    def spy(e):
        x=real(e); print('ERR', repr(e)[:200], retry.http_status(e), x); return x
    monkeypatch.setattr(r,'is_transient',spy)
    s=open_store("s3://tests/run")
    for i in range(6):
        def w(k):
            t=time.time(); g=s.put_if_absent(f"r{i}", bytes([k])*100, {}); print(i,k,g,round(time.time()-t,2))
        ts=[threading.Thread(target=w,args=(k,)) for k in range(8)]
        [t.start() for t in ts]; [t.join() for t in ts]
