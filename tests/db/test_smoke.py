from pgqrs_sa import Message

def test_x(service, session):
    service.enqueue("mail", 1); session.commit()
    assert service.dequeue("mail")

async def test_y(async_service, async_session):
    await async_service.enqueue_many("mail", [1, 2]); await async_session.commit()
    d = await async_service.dequeue("mail", 2)
    assert [x.payload for x in d]==[1,2]
    await async_service.archive_many(d)
    m=Message(queue_name="mail",payload={"a":1},delay=1); async_session.add(m); await async_session.flush(); assert m.id
    assert await async_service.messages.try_cancel(m.id)
    await async_service.check_schema()
    print(await async_service.messages.metrics("mail"))
